"""A site that accepts no inbound connection: the real operator's gateway, and the bridge's own end of the tunnel."""

import datetime as dt
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus_bridge.metrics import Metrics
from isthmus_bridge.network.dialout import DialOut
from isthmus_bridge.policy.policy import GatewaySettings
from isthmus_contracts.identities import bridge_server_name
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb.bridge_pb2_grpc import add_BridgeServicer_to_server
from isthmus_contracts.wire.pki import Authority
from isthmus_contracts.wire.transport import SERVER_OPTIONS, server_credentials
from tests.support.ports import free_port

from .bridge import FakeBridge
from .cluster import Namespace, Operator, eventually, kubectl, remove_site
from .test_sites import mixed, reachable

DAY = dt.timedelta(days=1)


class DialledOut(FakeBridge):
    """Bridge under the test's control that dials the gateway and listens nowhere else."""

    def __init__(self, name: str, gateway_port: int, gateway_authority: bytes) -> None:
        super().__init__()
        site = Authority.create("site CA", DAY)
        self._server_side = site.issue("bridge", DAY, hosts=[bridge_server_name(name)])
        self._client_side = site.issue("operator", DAY, uris=["isthmus://operator/test"])
        self._folder = Path(tempfile.mkdtemp(prefix="dial-out-"))
        (self._folder / "gateway-ca.crt").write_bytes(gateway_authority)
        self._gateway = GatewaySettings(address=f"127.0.0.1:{gateway_port}", site=name)
        self._dial_out: DialOut | None = None

    def up(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(4), options=SERVER_OPTIONS)
        add_BridgeServicer_to_server(self, self._server)
        self._server.add_secure_port(f"unix:{self._folder}/s", server_credentials(self._server_side))
        self._server.start()
        self._dial_out = DialOut([self._gateway], "fake", self._folder, Metrics())
        self._dial_out.start(self._folder / "s")

    def down(self) -> None:
        super().down()
        if self._dial_out is not None:
            self._dial_out.stop()
            self._dial_out = None

    def site(self, namespace: str, **spec: Any) -> dict[str, Any]:
        body = super().site(namespace, connection="DialOut", **spec)
        del body["spec"]["endpoint"]
        return body

    def close(self) -> None:
        shutil.rmtree(self._folder)


@pytest.fixture
def bridge(namespace: Namespace, operator: Operator, tmp_path: Path) -> Iterator[DialledOut]:
    """Yield the bridge of an HPC site that dials out, to an operator with a gateway. The bridge does not run yet."""
    authority = Authority.create("gateway CA", DAY)
    authority.issue("gateway", DAY, hosts=["127.0.0.1"]).write(tmp_path / "gateway")
    port = free_port()
    operator.stop()
    operator.options += ("--gateway", f"127.0.0.1:{port}", "--gateway-tls", str(tmp_path / "gateway"))
    operator.start()
    one = DialledOut(namespace.name, port, authority.certificate)
    namespace.apply(one.secret())
    kubectl("apply", "-f", "-", stdin=one.site(namespace.name))
    yield one
    one.down()
    one.close()
    remove_site(namespace.name)


def test_a_pool_at_a_site_that_dials_out(namespace: Namespace, operator: Operator, bridge: DialledOut) -> None:
    connected = f'isthmus_operator_gateway_connected{{site="{namespace.name}"}} '
    eventually(lambda: reachable(namespace.name) == "False/SiteNotConnected", "the site is not there yet", 90)
    assert f"{connected}0.0" in operator.metrics()
    namespace.apply(mixed(namespace))
    said = f"SiteUnreachable: {namespace.name} dials out, and no bridge of it is connected to the gateway"
    eventually(lambda: said in namespace.pool("lumi").get("reason", ""), "the pool's reason says so", 90)
    bridge.up()
    eventually(lambda: reachable(namespace.name) == "True/SiteReachable", "the site is reachable", 90)
    eventually(lambda: namespace.pool("lumi").get("reason") == "Resources", "the pool is submitted", 120)
    assert f"{connected}1.0" in operator.metrics()
    (request,) = bridge.requests
    # The bridge reconnects to the new operator, which requests no new pools.
    operator.kill()
    operator.start()
    eventually(lambda: f"{connected}1.0" in operator.metrics(), "the bridge is back", 120)
    bridge.move(pb.Pool.RUNNING, queued=0, running=2, reason="")
    eventually(lambda: namespace.pool("lumi")["queued"] == 0, "it runs", 120)
    bridge.down()
    eventually(lambda: reachable(namespace.name) == "False/SiteNotConnected", "the site is gone", 120)
    bridge.up()
    eventually(lambda: reachable(namespace.name) == "True/SiteReachable", "the site is back", 120)
    assert len(bridge.requests) == 1
    namespace.kubectl("delete", "fj", "demo", "--timeout=60s")
    assert bridge.cancelled == [request.key]
