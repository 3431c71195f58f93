"""The bridge's end of a tunnel, with a gateway that the test controls."""

import datetime as dt
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus_bridge.metrics import Metrics
from isthmus_bridge.network.dialout import DialOut, pause
from isthmus_bridge.network.gateway_check import reach
from isthmus_bridge.network.proxy import connect, proxy_for
from isthmus_bridge.policy.policy import GATEWAY_CA_FILE, GatewaySettings, PolicyError
from isthmus_contracts.pb import gateway_pb2 as pb
from isthmus_contracts.pb import gateway_pb2_grpc as rpc
from isthmus_contracts.wire.pki import Authority
from isthmus_contracts.wire.tunnel import MAX_CONNECTIONS
from tests.support.connect_proxy import ConnectProxy
from tests.support.fake_slurm import policy

DAY = dt.timedelta(days=1)


class FakeGateway(rpc.GatewayServicer):
    """Gateway that passes received frames to the test, and sends the frames that the test provides."""

    def __init__(self, tls: Path, authority: Authority) -> None:
        credentials = authority.issue("gateway", DAY, hosts=["localhost", "gateway.invalid"])
        self.heard: queue.Queue[pb.Frame] = queue.Queue()
        self.say: queue.Queue[pb.Frame | grpc.StatusCode] = queue.Queue()
        self._server = grpc.server(ThreadPoolExecutor(4))
        rpc.add_GatewayServicer_to_server(self, self._server)
        pair = [(credentials.key, credentials.certificate)]
        self.port = self._server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
        self._server.start()

    def Connect(self, request_iterator: Iterator[pb.Frame], context: Any) -> Iterator[pb.Frame]:
        def listen() -> None:
            try:
                for frame in request_iterator:
                    self.heard.put(frame)
            except grpc.RpcError:
                pass

        threading.Thread(target=listen, daemon=True).start()
        while True:
            frame = self.say.get()
            if isinstance(frame, grpc.StatusCode):
                context.abort(frame, "as told")
            else:
                yield frame

    def hear(self) -> pb.Frame:
        return self.heard.get(timeout=60)

    def stop(self) -> None:
        # Release the handlers' threads.
        for _ in range(4):
            self.say.put(grpc.StatusCode.UNAVAILABLE)
        self._server.stop(0).wait()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority.create("gateway CA", DAY)
    (tmp_path / GATEWAY_CA_FILE).write_bytes(made.certificate)
    return made


@pytest.fixture
def gateway(tmp_path: Path, authority: Authority) -> Iterator[FakeGateway]:
    one = FakeGateway(tmp_path, authority)
    yield one
    one.stop()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[socket.socket]:
    """Yield the socket of the bridge's own server."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        server.settimeout(60)
        yield server


@pytest.fixture
def dial_out(tmp_path: Path, gateway: FakeGateway, metrics: Metrics, local: socket.socket) -> Iterator[DialOut]:
    one = DialOut([GatewaySettings(address=f"localhost:{gateway.port}")], "lumi", tmp_path, metrics)
    one.start(tmp_path / "s")
    hello = gateway.hear().hello
    assert (hello.protocol, hello.site) == (1, "lumi")
    yield one
    one.stop()


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def up(metrics: Metrics) -> float:
    return sum(sample.value for family in metrics.gateway_connected.collect() for sample in family.samples)


def question_and_answer(gateway: FakeGateway, local: socket.socket) -> socket.socket:
    """Open connection 1 at the gateway, send a few bytes each way, and return its end at the bridge's own server."""
    gateway.say.put(pb.Frame(open=1))
    gateway.say.put(pb.Frame(data=pb.Data(connection=1, content=b"question")))
    here, _ = local.accept()
    here.settimeout(60)
    assert here.recv(100) == b"question"
    here.sendall(b"answer")
    assert gateway.hear() == pb.Frame(data=pb.Data(connection=1, content=b"answer"))
    return here


def test_a_connection_comes_out_at_the_bridges_own_server(
    dial_out: DialOut, gateway: FakeGateway, metrics: Metrics, local: socket.socket
) -> None:
    gateway.say.put(pb.Frame(welcome=pb.Welcome(version="1")))
    until(lambda: up(metrics) == 1, "the tunnel counts as up")
    here = question_and_answer(gateway, local)
    gateway.say.put(pb.Frame(close=1))
    assert here.recv(100) == b"", "a call that is cancelled ends here too"
    # The next connection stays open until the tunnel breaks.
    gateway.say.put(pb.Frame(open=2))
    second, _ = local.accept()
    second.settimeout(60)
    gateway.say.put(grpc.StatusCode.ABORTED)
    assert second.recv(100) == b""
    assert gateway.hear().HasField("hello"), "it dials again"
    until(lambda: up(metrics) == 0, "the tunnel counts as down")


def test_more_connections_than_agreed_are_closed_at_once(
    dial_out: DialOut, gateway: FakeGateway, local: socket.socket
) -> None:
    for number in range(1, MAX_CONNECTIONS + 2):
        gateway.say.put(pb.Frame(open=number))
    assert gateway.hear() == pb.Frame(close=MAX_CONNECTIONS + 1)


@pytest.mark.parametrize(
    "frames",
    [
        [pb.Frame(open=1), pb.Frame(open=1)],
        [pb.Frame(hello=pb.Hello(site="x"))],
        [pb.Frame(welcome=pb.Welcome()), pb.Frame(welcome=pb.Welcome())],
    ],
    ids=["open-twice", "hello", "welcome-twice"],
)
def test_a_gateway_that_breaks_the_protocol_is_left(
    dial_out: DialOut, gateway: FakeGateway, frames: list[pb.Frame], caplog: pytest.LogCaptureFixture
) -> None:
    for frame in frames:
        gateway.say.put(frame)
    until(lambda: "no tunnel to the gateway: " in caplog.text, "it says why")
    gateway.say.put(grpc.StatusCode.ABORTED)
    assert gateway.hear().HasField("hello"), "it dials again"


def test_pauses_grow_and_differ() -> None:
    assert [pause(failures, 0.0) for failures in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert pause(10_000, 0.999) == pytest.approx(15, abs=0.1)


def test_the_doctor_reports_problems_of_a_gateway(gateway: FakeGateway, authority: Authority, tmp_path: Path) -> None:
    here = GatewaySettings(address=f"localhost:{gateway.port}")
    assert reach(here, tmp_path) == (True, f"gateway {here.address}: can be reached, and its certificate is valid")
    good, line = reach(here.model_copy(update={"server_name": "other.example"}), tmp_path)
    assert not good and "its certificate is invalid: " in line and "other.example" in line
    (tmp_path / GATEWAY_CA_FILE).write_bytes(Authority.create("another CA", DAY).certificate)
    good, line = reach(here, tmp_path)
    assert not good and "its certificate is invalid: " in line and GATEWAY_CA_FILE in line
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    good, line = reach(GatewaySettings(address=f"localhost:{port}"), tmp_path)
    assert not good and "cannot be reached: " in line
    good, line = reach(GatewaySettings(address=f"localhost:{port}", ca=tmp_path / "absent"), tmp_path)
    assert not good and "its CA file cannot be read: " in line


@pytest.fixture
def proxy(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[ConnectProxy]:
    """Yield a proxy, the only one that can resolve the gateway's name."""
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ConnectProxy({"gateway.invalid:7446": ("127.0.0.1", gateway.port)}, "site:s3cr:t") as one:
        yield one


@pytest.mark.parametrize("how", ["policy", "environment"])
def test_it_dials_through_an_http_proxy(
    tmp_path: Path, gateway: FakeGateway, metrics: Metrics, local: socket.socket, proxy: ConnectProxy, how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    url = f"http://site:s3cr%3At@localhost:{proxy.port}"
    if how == "environment":
        monkeypatch.setenv("https_proxy", url)
    settings = GatewaySettings(address="gateway.invalid:7446", proxy=url if how == "policy" else None)
    assert reach(settings, tmp_path) == (
        True,
        f"gateway gateway.invalid:7446: can be reached through the proxy http://localhost:{proxy.port}, and its"
        " certificate is valid",
    )
    one = DialOut([settings], "lumi", tmp_path, metrics)
    one.start(tmp_path / "s")
    try:
        assert gateway.hear().hello.site == "lumi"
        question_and_answer(gateway, local)
    finally:
        one.stop()
    assert set(proxy.asked) == {("gateway.invalid:7446", 200)}


def test_a_proxy_is_asked_for_an_ipv6_address_in_brackets(gateway: FakeGateway, proxy: ConnectProxy) -> None:
    there = "[2001:db8::7]:7446"
    proxy.hosts[there] = ("127.0.0.1", gateway.port)
    url = f"http://site:s3cr%3At@localhost:{proxy.port}"
    connect(GatewaySettings(address=there, proxy=url), 60).close()
    assert proxy.asked == [(there, 200)]


def test_problems_of_a_proxy_are_reported_without_its_password(
    tmp_path: Path, gateway: FakeGateway, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://site:wrong@localhost:{proxy.port}"
    here = GatewaySettings(address="gateway.invalid:7446", proxy=url)
    good, line = reach(here, tmp_path)
    assert not good and "wrong" not in line
    assert f"cannot be reached: proxy http://localhost:{proxy.port}: Tunnel connection failed: 407" in line
    elsewhere = GatewaySettings(address="other.invalid:7446", proxy=url.replace("wrong", "s3cr%3At"))
    assert "Tunnel connection failed: 403" in reach(elsewhere, tmp_path)[1]
    monkeypatch.setenv("https_proxy", "https://secret@proxy:1")
    assert reach(here.model_copy(update={"proxy": None}), tmp_path) == (
        False, "gateway gateway.invalid:7446: cannot be reached: https_proxy is not http://HOST:PORT",
    )  # fmt: skip
    # Hosts in no_proxy are dialled directly, for any source of the proxy.
    monkeypatch.setenv("no_proxy", "localhost,.invalid")
    direct = GatewaySettings(address=f"localhost:{gateway.port}", proxy=url)
    assert proxy_for(direct) is None and proxy_for(here) is None
    assert reach(direct, tmp_path)[0]


def test_a_bridge_that_dials_out_listens_only_at_a_configured_address(tmp_path: Path) -> None:
    gateways = [{"address": "gateway.example:7446"}]
    assert policy(tmp_path).inbound == "0.0.0.0:7444"
    assert policy(tmp_path, gateways=gateways).inbound is None
    assert policy(tmp_path, gateways=gateways, listen="10.0.0.1:7444").inbound == "10.0.0.1:7444"
    with pytest.raises(PolicyError, match=r"gateways\[0\].address: 'gateway.example' is not HOST:PORT"):
        policy(tmp_path, gateways=[{"address": "gateway.example"}])
