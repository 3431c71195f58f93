"""A bridge process that only dials out, the operator's gateway and its client, over real gRPC and TLS."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc import aio

from isthmus_contracts.identities import operator_identity
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.wire.pki import Authority
from isthmus_operator.effects.bridge_channels import BridgeError, NotConnectedError
from isthmus_operator.state.observed import PoolPhase, PoolView, ProblemKind
from tests.support.connect_proxy import ConnectProxy
from tests.support.fake_slurm import KEY, spec

from .operator_side import DAY, SITE, OperatorSide, until

ROOT = Path(__file__).parents[3]


class BridgeProcess:
    """Site with its own CA, whose bridge knows only the gateway."""

    def __init__(
        self, folder: Path, gateway: Authority, port: int, authority: Authority | None = None, host: str = "localhost"
    ) -> None:
        folder.mkdir()
        self.folder = folder
        self.authority = authority or Authority.create("site CA", DAY)
        self.authority.issue("bridge", DAY, hosts=[f"{SITE}.bridge.isthmus.dev"]).write(folder / "tls")
        (folder / "tls" / "gateway-ca.crt").write_bytes(gateway.certificate)
        self._connect = f"{host}:{port}"
        content = {
            "site": SITE, "run_dir": str(folder / "run"), "tls_dir": str(folder / "tls"), "metrics_listen": None,
            "identities": [{"uri": operator_identity("prod")}], "partitions": ["main", "debug"],
            "environments": {"plain": {"prefix": ["env"]}},
            "slurm": {"poll_seconds": 0.2, "absence_seconds": 30, "absence_lookups": 3},
        }  # fmt: skip
        (folder / "policy.yaml").write_text(yaml.safe_dump(content))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, proxy: str = "") -> None:
        argv = [sys.executable, "-m", "tests.integration.gateway.site_process", "serve"]
        argv += ["--policy", str(self.folder / "policy.yaml"), "--connect", self._connect]
        argv += ["--proxy", proxy] if proxy else []
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(argv, cwd=ROOT, stderr=log)

    def said(self) -> list[dict[str, Any]]:
        """Return the JSON lines of the bridge's log."""
        lines = (self.folder / "log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def says(self, text: str) -> bool:
        return any(text in line["message"] for line in self.said())

    def listens(self) -> list[str]:
        """Return the addresses of the bridge's listening TCP sockets."""
        assert self.process is not None
        inodes = set()
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            target = str(entry.readlink()) if entry.is_symlink() else ""
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
        rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()]
        return [row[1] for row in rows if len(row) > 9 and row[3] == "0A" and row[9] in inodes]

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(number)
        code = self.process.wait(120)
        self.process = None
        return code


async def ensure(operator: OperatorSide) -> PoolView:
    credentials = Authority.create("job CA", DAY).issue("client", DAY, uris=["isthmus://job/u/pool/p"])
    return await operator.bridges.ensure(SITE, KEY, spec(), credentials, {})


@pytest.fixture
def gateway_ca(tmp_path: Path) -> Authority:
    authority = Authority.create("gateway CA", DAY)
    authority.issue("gateway", DAY, hosts=["localhost", "gateway.invalid"]).write(tmp_path / "gateway")
    return authority


@pytest.fixture
async def operator(tmp_path: Path, gateway_ca: Authority) -> AsyncIterator[OperatorSide]:
    one = OperatorSide(tmp_path / "gateway")
    yield one
    await one.stop()


@pytest.fixture
def site(tmp_path: Path, gateway_ca: Authority, operator: OperatorSide) -> Iterator[BridgeProcess]:
    one = BridgeProcess(tmp_path / "site", gateway_ca, operator.port)
    operator.knows(one.authority)
    one.start()
    yield one
    one.end()
    print((one.folder / "log").read_text())


async def test_every_call_goes_through_the_tunnel(operator: OperatorSide, site: BridgeProcess) -> None:
    await operator.connected()
    assert site.listens() == [], "a bridge that dials out listens nowhere"
    described = await operator.bridges.describe(SITE)
    assert (described.name, described.slurm_version, list(described.partitions)) == (SITE, "22.05.8", ["main", "debug"])
    assert (await ensure(operator)).job_id == "100"
    assert (await ensure(operator)).job_id == "100"
    log = site.folder / "run" / KEY / "logs" / "1.log"
    log.write_text("".join(f"line {number}\n" for number in range(20_000)))
    assert (await operator.bridges.tail(SITE, KEY, 1, 1000)).endswith(b"line 19999")
    assert (await operator.bridges.get(SITE, "no-such-pool", 0)).phase is PoolPhase.ABSENT
    # The policy decides as it does for an inbound call.
    with pytest.raises(BridgeError, match="policy partitions: 'gpu' is not allowed") as refused:
        await operator.bridges.ensure(
            SITE, "f" * 32, spec(partition="gpu"), Authority.create("j", DAY).issue("c", DAY, uris=["x://y"]), {}
        )
    assert refused.value.kind is ProblemKind.DENIED
    assert (await operator.bridges.cancel(SITE, KEY, 1, "done")).phase is PoolPhase.CANCELLED
    assert site.end(signal.SIGTERM) == 0
    await until(lambda: SITE not in operator.gateway.addresses, "the gateway notices")
    with pytest.raises(NotConnectedError, match="no bridge of it is connected to the gateway"):
        await operator.bridges.describe(SITE)


async def test_either_side_may_be_killed_and_comes_back(operator: OperatorSide, site: BridgeProcess) -> None:
    await operator.connected()
    before = await ensure(operator)
    stub = await operator.channels.stub(SITE)
    assert (await stub.GetPool(pb.GetPoolRequest(key=KEY), timeout=60)).key == KEY
    assert site.process is not None
    site.process.send_signal(signal.SIGSTOP)
    call = asyncio.ensure_future(stub.GetPool(pb.GetPoolRequest(key=KEY)))
    site.end(signal.SIGKILL)
    # The call fails at once, as over any connection that breaks.
    with pytest.raises(aio.AioRpcError) as broken:
        await asyncio.wait_for(call, 60)
    assert broken.value.code() is grpc.StatusCode.UNAVAILABLE
    await until(lambda: SITE not in operator.gateway.addresses, "the gateway notices")
    site.start()
    await operator.connected()
    assert (await operator.bridges.get(SITE, KEY, 1)).job_id == before.job_id

    await operator.stop()
    await until(lambda: site.says("no tunnel to the gateway"), "the bridge notices")
    operator.start()
    await operator.connected()
    assert (await operator.bridges.get(SITE, KEY, 1)).job_id == before.job_id


async def test_a_site_that_only_its_proxy_connects_to_the_outside(
    operator: OperatorSide, tmp_path: Path, gateway_ca: Authority
) -> None:
    site = BridgeProcess(tmp_path / "site", gateway_ca, operator.port, host="gateway.invalid")
    operator.knows(site.authority)
    name = f"gateway.invalid:{operator.port}"
    with ConnectProxy({}) as proxy:
        site.start(f"http://localhost:{proxy.port}")
        try:
            await until(lambda: (name, 403) in proxy.asked, "the proxy is asked")
            await until(lambda: site.says("no tunnel to the gateway"), "the bridge says why")
            assert SITE not in operator.gateway.addresses
            proxy.hosts[name] = ("127.0.0.1", operator.port)
            await operator.connected()
            assert (await ensure(operator)).job_id == "100"
            assert (await operator.bridges.cancel(SITE, KEY, 1, "done")).phase is PoolPhase.CANCELLED
        finally:
            site.end()
            print((site.folder / "log").read_text())


async def test_no_other_site_can_take_its_place(
    operator: OperatorSide, site: BridgeProcess, tmp_path: Path, gateway_ca: Authority
) -> None:
    await operator.connected()
    address = operator.gateway.addresses[SITE]
    # It uses the site's name, also in its certificate, but the CA of another site signed it.
    impostor = BridgeProcess(tmp_path / "impostor", gateway_ca, operator.port)
    impostor.start()
    try:
        refusal = "PERMISSION_DENIED: the bridge does not prove that it is lumi"
        await until(lambda: impostor.says(refusal), "the impostor is refused")
    finally:
        impostor.end()
        print((impostor.folder / "log").read_text())
    assert operator.gateway.addresses == {SITE: address}
    assert (await operator.bridges.describe(SITE)).name == SITE


async def test_a_gateway_of_another_authority_is_not_used(operator: OperatorSide, tmp_path: Path) -> None:
    deceived = BridgeProcess(tmp_path / "site", Authority.create("gateway CA", DAY), operator.port)
    operator.knows(deceived.authority)
    deceived.start()
    try:
        await until(lambda: deceived.says("Tls handshake failed"), "the bridge says why")
    finally:
        deceived.end()
        print((deceived.folder / "log").read_text())
    assert operator.gateway.addresses == {}
    assert deceived.says("serving")
