"""Tests of the channel to a site's bridge when its Secret changes, over real gRPC with mutual TLS."""

import asyncio
import base64
import datetime as dt
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.identities import operator_identity
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb.bridge_pb2_grpc import BridgeServicer, add_BridgeServicer_to_server
from isthmus_contracts.wire.pki import Authority, Credentials
from isthmus_contracts.wire.transport import renewed_server_credentials
from isthmus_operator.effects import bridge
from isthmus_operator.effects import bridge_channels as module
from isthmus_operator.effects.bridge import Bridges, CircuitOpenError
from isthmus_operator.effects.bridge_channels import BridgeChannels, BridgeError
from isthmus_operator.effects.circuit_breaker import FAILURES
from isthmus_operator.metrics import REGISTRY
from isthmus_operator.state.clock import Clock
from isthmus_operator.state.job_store import SiteStore
from isthmus_operator.state.observed import ProblemKind

DAY = dt.timedelta(days=1)


class Slow(BridgeServicer):
    """A bridge that responds to DescribeSite at once and to GetPool when it is allowed to."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.asked = asyncio.Event()

    async def DescribeSite(self, request: pb.DescribeSiteRequest, context: Any) -> pb.Site:  # type: ignore[override]
        return pb.Site(name="here")

    async def GetPool(self, request: pb.GetPoolRequest, context: Any) -> pb.Pool:  # type: ignore[override]
        self.asked.set()
        await self.may.wait()
        return pb.Pool(phase=pb.Pool.RUNNING, running=1)

    async def CancelPool(self, request: pb.CancelPoolRequest, context: Any) -> pb.Pool:  # type: ignore[override]
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "policy drain: not now")
        raise AssertionError("abort() raises")


class Site:
    """A bridge and the operator's side of it."""

    def __init__(self, tls: Path) -> None:
        self.tls = tls
        self.authority = Authority.create("site", DAY)
        self.servicer = Slow()
        self.secret: dict[str, Any] = {}
        self.sites = SiteStore()
        self.channels = BridgeChannels(self, self.sites, None)  # type: ignore[arg-type]
        self.bridges = Bridges(self.channels, Clock())

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        return self.secret

    def serves_with(self, authority: Authority, trusted: bytes) -> None:
        own = authority.issue("bridge", DAY, hosts=["127.0.0.1"])
        Credentials(trusted, own.certificate, own.key).write(self.tls)

    def calls_with(self, authority: Authority, trusted: bytes) -> None:
        own = authority.issue("operator", DAY, uris=[operator_identity("prod")])
        files = Credentials(trusted, own.certificate, own.key).files()
        self.secret = {"data": {name: base64.b64encode(content).decode() for name, content in files.items()}}

    def known(self, port: int) -> None:
        spec = {"endpoint": f"127.0.0.1:{port}", "tls": {"secretRef": {"name": "s", "namespace": "n"}},
                "allowedNamespaces": ["*"]}  # fmt: skip
        self.sites.put({"metadata": {"name": "here", "resourceVersion": "1"}, "spec": spec})

    async def works(self) -> bool:
        try:
            return (await self.bridges.describe("here")).name == "here"
        except BridgeError:
            return False

    async def works_soon(self) -> None:
        async with asyncio.timeout(60):
            while not await self.works():  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    # A Secret is read before each call instead of once a minute.
    monkeypatch.setattr(module, "_CREDENTIALS_SECONDS", 0.0)
    one = Site(tmp_path / "tls")
    one.serves_with(one.authority, one.authority.certificate)
    one.calls_with(one.authority, one.authority.certificate)
    server = aio.server()
    add_BridgeServicer_to_server(one.servicer, server)
    one.known(server.add_secure_port("127.0.0.1:0", renewed_server_credentials(one.tls)))
    await server.start()
    yield one
    one.servicer.may.set()
    await one.bridges.close()
    await server.stop(0)


async def test_a_site_changes_its_authority_step_by_step_and_stays_reachable(site: Site) -> None:
    """docs/operating/bridge/install.md describes the steps.

    Both CAs are trusted before the new one signs the certificate that the other end checks.
    """
    old, new = site.authority, Authority.create("site", DAY)
    both = new.certificate + old.certificate
    assert await site.works()
    site.serves_with(old, both)
    assert await site.works()
    site.calls_with(new, both)
    assert await site.works()
    site.serves_with(new, both)
    assert await site.works()
    site.calls_with(new, new.certificate)
    site.serves_with(new, new.certificate)
    await site.works_soon()
    # The old certificate is no longer valid.
    site.calls_with(old, new.certificate)
    assert not await site.works()


async def test_calls_under_way_survive_a_change_of_the_secret_and_the_end_of_the_site(site: Site) -> None:
    for change in (lambda: site.calls_with(site.authority, site.authority.certificate), lambda: None):
        site.servicer.asked.clear()
        site.servicer.may.clear()
        under_way = asyncio.create_task(site.bridges.get("here", "key", 0))
        async with asyncio.timeout(60):
            await site.servicer.asked.wait()
        change()
        assert await site.works()
        await site.bridges.forget("here")
        site.servicer.may.set()
        async with asyncio.timeout(60):
            assert (await under_way).running == 1


@pytest.fixture
async def impatient(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Return a connected site with short deadlines for calls."""
    assert await site.works()
    monkeypatch.setattr(bridge, "CALL_SECONDS", 0.3)
    return site


async def test_a_silent_site_is_left_alone_and_says_so(impatient: Site) -> None:
    calls = [asyncio.create_task(impatient.bridges.get("here", "key", 0)) for _ in range(FAILURES)]
    failed = await asyncio.gather(*calls, return_exceptions=True)
    assert all("DEADLINE_EXCEEDED" in str(error) for error in failed)
    with pytest.raises(CircuitOpenError, match=r"here did not respond to its last calls \(GetPool: DEADLINE_EXCEEDED"):
        await impatient.bridges.get("here", "key", 0)
    assert REGISTRY.get_sample_value("isthmus_operator_circuit_open", {"site": "here"}) == 1
    with pytest.raises(BridgeError, match="describes itself, but did not respond to its last calls"):
        await impatient.bridges.describe("here")
    # One call tries the site, and its response closes the breaker for all.
    impatient.servicer.may.set()
    impatient.bridges._state("here").breaker._retry_at = 0.0
    assert (await impatient.bridges.get("here", "key", 0)).running == 1
    assert (await impatient.bridges.describe("here")).name == "here"
    assert REGISTRY.get_sample_value("isthmus_operator_circuit_open", {"site": "here"}) == 0


async def test_calls_above_the_limit_of_a_site_wait_no_longer_than_one_call(impatient: Site) -> None:
    count = 3 * bridge._CALLS_PER_SITE
    calls = [asyncio.create_task(impatient.bridges.get("here", "key", 0)) for _ in range(count)]
    async with asyncio.timeout(20):
        failed = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(error, BridgeError) for error in failed)
    assert sum("DEADLINE_EXCEEDED" in str(error) for error in failed) <= count


async def test_a_temporary_denial_shows_the_policys_message(site: Site) -> None:
    with pytest.raises(BridgeError) as caught:
        await site.bridges.cancel("here", "key", 0, "gone")
    assert (str(caught.value), caught.value.kind) == ("policy drain: not now", ProblemKind.UNREACHABLE)
    assert caught.value.reason is Reason.POLICY_DENIED


async def test_a_refusal_is_an_answer(impatient: Site) -> None:
    for _ in range(2 * FAILURES):
        with pytest.raises(BridgeError):
            await impatient.bridges.shrink("here", "key", 1)  # UNIMPLEMENTED there
    assert REGISTRY.get_sample_value("isthmus_operator_circuit_open", {"site": "here"}) == 0
