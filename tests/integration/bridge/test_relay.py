"""The relay: the part of a connection that it reads, the destination that it selects, and its refusals."""

import datetime as dt
import json
import resource
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus_bridge.metrics import Metrics
from isthmus_bridge.network.relay.capacity import reserve_files
from isthmus_bridge.network.relay.client_hello import LONGEST, MOST_RECORDS, ClientHello, NotTls
from isthmus_bridge.network.relay.server import Relay, Route, connections_of, routes
from isthmus_bridge.policy.authorization import Denial, decide
from isthmus_bridge.policy.policy import RelaySettings
from isthmus_bridge.server import Bridge
from isthmus_contracts.identities import aggregator_server_name
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.wire.pki import Authority
from isthmus_contracts.wire.transport import SERVER_OPTIONS, channel, server_credentials
from tests.support.fake_slurm import OPERATOR, FakeSlurm, policy, spec

DAY = dt.timedelta(days=1)
NAME = aggregator_server_name("u1")
SETTINGS = RelaySettings(listen="127.0.0.1:0", address="login1:7445", destinations=["127.0.0.1:*"])


def client_hello(name: str | None) -> bytes:
    """Return the first bytes of a real TLS client."""
    context = ssl.create_default_context()
    if name is None:
        context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


HELLO = client_hello(NAME)


def server_name(data: bytes) -> str | None:
    return ClientHello().feed(data)


def in_records(content: bytes, size: int) -> bytes:
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2) + piece for piece in pieces)


def test_the_name_in_a_real_hello_however_it_is_cut() -> None:
    assert server_name(HELLO) == NAME
    assert server_name(HELLO + b"more") == NAME
    assert server_name(client_hello(NAME.upper())) == NAME
    assert server_name(client_hello(None)) == ""
    assert all(server_name(HELLO[:end]) is None for end in range(len(HELLO)))
    assert server_name(in_records(HELLO[5:], 50)) == NAME


def test_a_hello_that_dribbles_in_is_read_once() -> None:
    hello = ClientHello()
    found = [hello.feed(HELLO[at : at + 1]) for at in range(len(HELLO))]
    assert found[:-1] == [None] * (len(HELLO) - 1) and found[-1] == NAME
    assert hello.data == HELLO


def test_records_are_bounded() -> None:
    content = b"\x01" + (60_000).to_bytes(3) + bytes(MOST_RECORDS)
    assert server_name(in_records(content[:MOST_RECORDS], 1)) is None
    with pytest.raises(NotTls, match="too many records"):
        server_name(in_records(content[: MOST_RECORDS + 1], 1))


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n", b"\x16\x02", b"\x17\x03\x03\x00\x01\x00", b"\x16\x03\x01\x00\x00", b"\x16\x03\x01\xff\xff",
     b"\x16\x03\x01\x00\x01\x02", b"\x16\x03\x01\x00\x04\x01\xff\xff\xff", b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x03"],
)  # fmt: skip
def test_what_is_no_hello(data: bytes) -> None:
    with pytest.raises(NotTls):
        server_name(data)


@given(st.binary(max_size=200), st.integers(0, len(HELLO)), st.integers(0, len(HELLO)))
def test_nothing_else_is_raised(noise: bytes, start: int, end: int) -> None:
    for data in (noise, HELLO[:start] + noise + HELLO[end:], b"\x16\x03\x01" + noise):
        try:
            found = server_name(data)
        except NotTls:
            continue
        assert found is None or isinstance(found, str)


def test_routes() -> None:
    listed = [("A.x", "h:1", 2), ("a.x", "h:1", 3), ("b.x", "[::1]:9", 1), ("a.x", "elsewhere:1", 5)]
    assert routes(listed) == {
        "a.x": Route("h", 1, connections_of(2) + 6),
        "b.x": Route("::1", 9, connections_of(1)),
    }


@pytest.mark.parametrize(
    ("relay", "message"),
    [
        (None, "policy relay: this site's bridge relays nothing; its nodes must reach the aggregator themselves"),
        (
            {"listen": "127.0.0.1:0", "address": "login1:7445", "destinations": ["*.k8s.example:*"]},
            f"policy relay.destinations: 'aggregator.example:7443' is not allowed for {OPERATOR};"
            " allowed: *.k8s.example:*",
        ),
    ],
)
def test_denials(tmp_path: Path, relay: object, message: str) -> None:
    site = policy(tmp_path, relay=relay)
    wanted = spec()
    wanted.federation.via_bridge = True
    denial = decide(site, site.identities[0], wanted)
    assert isinstance(denial, Denial) and str(denial) == message


@pytest.mark.parametrize(
    ("pattern", "endpoint", "granted"),
    [
        ("10.1.*:7443", "10.1.2.3:7443", True),
        ("10.1.*:7443", "10.1.attacker.example:7443", False),
        ("10.1.*", "10.1.attacker.example:7443", False),
        ("10.1.*:*", "10.1.2.3.example:7443", False),
        ("10.1.[0-9].*:7443", "10.1.2.x:7443", False),
        ("[2001:db8::*]:7443", "[2001:db8::7]:7443", True),
        ("[2001:db8::*]:7443", "[2001:db9::7]:7443", False),
        ("[2001:db8::*]:7443", "d:7443", False),
        ("[fd00::7]:*", "[fd00::7]:7443", True),
        ("[ab]*.example:7443", "a1.example:7443", True),
        ("*.k8s.example:*", "a1.k8s.example:7443", True),
        ("node1*.example:7443", "node12.example:7443", True),
        ("*:7443", "anybody.example:7443", True),
    ],
)
def test_a_pattern_of_addresses_matches_no_name(tmp_path: Path, pattern: str, endpoint: str, granted: bool) -> None:
    site = policy(tmp_path, relay={"listen": "127.0.0.1:0", "address": "login1:7445", "destinations": [pattern]})
    wanted = spec()
    wanted.federation.via_bridge = True
    wanted.federation.endpoint = endpoint
    assert isinstance(decide(site, site.identities[0], wanted), Denial) is not granted


class Far:
    """Listener that the relay dials."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]

    def accept(self) -> socket.socket:
        self.listener.settimeout(60)
        connection, _ = self.listener.accept()
        connection.settimeout(60)
        return connection


@pytest.fixture
def far() -> Iterator[Far]:
    one = Far()
    with closing(one.listener):
        yield one


@pytest.fixture
def relaying() -> Iterator[Callable[..., tuple[Relay, Metrics]]]:
    started: list[Relay] = []

    def start(found: dict[str, Route], **changes: Any) -> tuple[Relay, Metrics]:
        metrics = Metrics()
        relay = Relay(SETTINGS.model_copy(update=changes), found.get, metrics)
        relay.start()
        started.append(relay)
        return relay, metrics

    yield start
    for relay in started:
        relay.stop()


def dial(relay: Relay) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", relay.port), timeout=60)
    connection.settimeout(60)
    return connection


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


def ended(connection: socket.socket) -> bool:
    """Return whether the other side has closed the connection without sending data."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_bytes_arrive_as_they_were_sent_and_half_a_connection_may_end(far: Far, relaying: Any) -> None:
    relay, metrics = relaying({NAME: Route("127.0.0.1", far.port, 8)})
    with dial(relay) as near:
        near.sendall(HELLO[:7])
        near.sendall(HELLO[7:] + b"and more")
        near.shutdown(socket.SHUT_WR)
        with far.accept() as other:
            received = b""
            while chunk := other.recv(4096):
                received += chunk
            assert received == HELLO + b"and more"
            other.sendall(b"answer")
        assert near.recv(100) == b"answer"
        assert ended(near)
    deadline = time.monotonic() + 60
    while value(metrics, "isthmus_bridge_relay_connections"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert value(metrics, "isthmus_bridge_relay_bytes_total", direction="to-aggregator") == len(received)
    assert value(metrics, "isthmus_bridge_relay_bytes_total", direction="to-client") == len(b"answer")
    assert relay.forwarded(NAME.upper()) == (len(received), len(b"answer"))
    assert relay.forwarded(NAME) == (0, 0)


def test_a_sender_waits_for_a_slow_receiver(far: Far, relaying: Any) -> None:
    relay, metrics = relaying({NAME: Route("127.0.0.1", far.port, 8)})
    with dial(relay) as near, _joined(near, far):
        near.setblocking(False)
        sent, still = 0, 0
        deadline = time.monotonic() + 60
        # Send until nothing has been accepted for half a second: then every buffer on the path is full.
        while still < 50 and time.monotonic() < deadline:
            try:
                sent += near.send(b"x" * 65536)
                still = 0
            except BlockingIOError:
                still += 1
                time.sleep(0.01)
        assert still == 50, f"{sent} bytes went, and nobody read them"
        # The sockets buffer some megabytes; beyond that, the relay's own buffers bound the data that it accepts.
        assert value(metrics, "isthmus_bridge_relay_bytes_total", direction="to-aggregator") < 32 << 20


def _joined(near: socket.socket, far: Far) -> socket.socket:
    near.sendall(HELLO)
    return far.accept()


def test_connections_without_a_destination(far: Far, relaying: Any) -> None:
    gone = socket.create_server(("127.0.0.1", 0))
    nobody = gone.getsockname()[1]
    gone.close()
    relay, metrics = relaying({NAME: Route("127.0.0.1", far.port, 1), "gone.x": Route("127.0.0.1", nobody, 9)})
    refused = {
        "unknown": client_hello("other.aggregator.isthmus.dev"),
        "not-tls": b"GET / HTTP/1.1\r\n\r\n",
        "unreachable": client_hello("gone.x"),
    }
    for reason, data in refused.items():
        with dial(relay) as near:
            near.sendall(data)
            assert ended(near)
        assert value(metrics, "isthmus_bridge_relay_refused_total", reason=reason) == 1
    with dial(relay) as first, _joined(first, far), dial(relay) as second:
        second.sendall(HELLO)
        assert ended(second)
    assert value(metrics, "isthmus_bridge_relay_refused_total", reason="limit") == 1


def test_the_limit_of_all(far: Far, relaying: Any) -> None:
    relay, metrics = relaying({NAME: Route("127.0.0.1", far.port, 9)}, connections=1)
    with dial(relay) as first, _joined(first, far), dial(relay) as second:
        assert ended(second)
    assert value(metrics, "isthmus_bridge_relay_refused_total", reason="limit") == 1


def test_connections_that_say_nothing_leave_room_for_those_that_do(far: Far, relaying: Any) -> None:
    relay, metrics = relaying({NAME: Route("127.0.0.1", far.port, 9)}, connections=8)
    silent = [dial(relay) for _ in range(2)]
    with dial(relay) as third:
        assert ended(third), "one in four may be without a name"
    assert value(metrics, "isthmus_bridge_relay_refused_total", reason="limit") == 1
    silent.pop().close()
    deadline = time.monotonic() + 60
    while not value(metrics, "isthmus_bridge_relay_refused_total", reason="not-tls"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with dial(relay) as named, _joined(named, far):
        pass
    silent.pop().close()


@pytest.mark.parametrize(
    ("limits", "connections", "room", "soft"),
    [
        ((1024, 524_288), 4096, 4096, 8832),
        ((1024, 4096), 4096, 1728, 4096),
        ((1024, resource.RLIM_INFINITY), 4096, 4096, 8832),
        ((65_536, 524_288), 4096, 4096, 65_536),
        ((256, 256), 4096, 1, 256),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 4096, 4096, resource.RLIM_INFINITY),
    ],
)
def test_the_bridge_keeps_descriptors_for_itself(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], connections: int, room: int, soft: int
) -> None:
    now = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: now.append(new))
    assert reserve_files(connections) == room
    assert now == [limits, *([] if soft == limits[0] else [(soft, limits[1])])]


def test_a_relay_holds_no_more_than_there_are_descriptors_for(
    far: Far, relaying: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (644, 644))
    relay, metrics = relaying({NAME: Route("127.0.0.1", far.port, 9)})
    assert "relay: room for 2 connections only, not for 4096: raise the limit of open files" in caplog.text
    with dial(relay) as one, _joined(one, far), dial(relay) as two, _joined(two, far), dial(relay) as third:
        assert ended(third)
    assert value(metrics, "isthmus_bridge_relay_refused_total", reason="limit") == 1


def test_a_flood_of_refusals_is_one_line(relaying: Any, caplog: pytest.LogCaptureFixture) -> None:
    relay, metrics = relaying({})
    for _ in range(20):
        with dial(relay) as near:
            near.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert ended(near)
    assert value(metrics, "isthmus_bridge_relay_refused_total", reason="not-tls") == 20
    assert len([record for record in caplog.records if record.message.startswith("relay: ")]) == 1


def test_a_flood_that_is_no_name_is_cut_off(relaying: Any) -> None:
    relay, _ = relaying({})
    record = b"\x16\x03\x01\x40\x00" + b"\x01\x00\xff\xff" + bytes((1 << 14) - 4)
    filler = b"\x16\x03\x01\x00\x01\x00"
    with dial(relay) as near:
        near.sendall(record)
        try:
            near.sendall(filler * (LONGEST // 2))
        except ConnectionError:
            return
        assert ended(near)


class Echo(grpc.GenericRpcHandler):
    """Handler that answers every method with the request."""

    def service(self, call: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        return grpc.unary_unary_rpc_method_handler(lambda request, context: request)


def test_grpc_with_mutual_tls_through_a_whole_bridge(tmp_path: Path) -> None:
    """The client trusts only the job's CA, so its peer holds the aggregator's key, which the relay does not."""
    job, site = Authority.create("job", DAY), Authority.create("site", DAY)
    site.issue("localhost", DAY, hosts=["localhost"]).write(tmp_path / "tls")
    pool = ThreadPoolExecutor(4)
    server = grpc.server(pool, handlers=[Echo()], options=[*SERVER_OPTIONS, ("grpc.max_receive_message_length", -1)])
    port = server.add_secure_port("127.0.0.1:0", server_credentials(job.issue("aggregator", DAY, hosts=[NAME])))
    server.start()
    relay = {"listen": "127.0.0.1:0", "address": "login1:7445", "destinations": [f"127.0.0.1:{port}"]}
    slurm = FakeSlurm(time.time)
    bridge = Bridge(policy(tmp_path, listen="127.0.0.1:0", metrics_listen=None, relay=relay), slurm)
    bridge.start()
    try:
        client = job.issue("client", DAY, uris=["isthmus://job/u1/pool/p"])
        wanted = spec(job_uid="u1")
        wanted.federation.MergeFrom(
            pb.Federation(endpoint=f"127.0.0.1:{port}", server_name=NAME, via_bridge=True)
        )  # fmt: skip
        with channel(f"127.0.0.1:{bridge.relay_port}", client, NAME) as through:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = through.unary_unary("/any/thing")
            with pytest.raises(grpc.RpcError):
                call(b"x", timeout=2)  # no pool with that name exists yet
            caller = bridge.current_policy.policy.identities[0]
            bridge.pools.ensure(caller, "0123456789abcdef", wanted)
            payload = bytes(range(256)) * 8192
            assert call(payload, timeout=60, wait_for_ready=True) == payload
            answers = list(ThreadPoolExecutor(8).map(lambda n: call(bytes([n]) * 1000, timeout=60), range(32)))
            assert answers == [bytes([n]) * 1000 for n in range(32)]
        script = (bridge.current_policy.policy.run_dir / "0123456789abcdef" / "batch.sh").read_text()
        assert "ISTHMUS_ENDPOINT=login1:7445" in script
        slurm.arrays[0].states = ["COMPLETED"] * 3
        assert bridge.pools.wait("0123456789abcdef", lambda entry: entry.state.over, 60) is not None
        deadline = time.monotonic() + 60
        while b'"event":"ended"' not in (log := (tmp_path / "audit.jsonl").read_bytes()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        record = json.loads(log.splitlines()[-1])
        assert record["relayed_to_aggregator"] > len(payload) < record["relayed_to_clients"]
    finally:
        bridge.stop()
        server.stop(0).wait()
        pool.shutdown()
