"""Malicious connections: they exhaust neither the aggregator's descriptors nor its memory."""

import resource
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import grpc
import pytest

from bench.soak.http2 import frame, length, literal
from isthmus.aggregator.__main__ import _FURTHER_CONNECTIONS
from isthmus.aggregator.rpc.connections import CONNECTIONS_OF_EACH
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.wire.transport import SERVER_OPTIONS

from .conftest import SERVER_NAME, Federation, eventually
from .test_protocol import HandMadeClient

_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4
_MAX_CONCURRENT_STREAMS = 3


@pytest.fixture
def client(federation: Callable[..., Federation]) -> Iterator[HandMadeClient]:
    job = federation(1, 2)
    job.start_aggregator()
    made = HandMadeClient(job)
    yield made
    made.close()


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident_megabytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) >> 10


@pytest.mark.usefixtures("many_files")
def test_connections_of_strangers_leave_descriptors(client: HandMadeClient) -> None:
    job, bound = client.job, CONNECTIONS_OF_EACH + _FURTHER_CONNECTIONS
    assert job.aggregator is not None
    assert client.offer().kind == pb.Offer.INITIALIZE
    before = open_files(job.aggregator.pid)
    with ExitStack() as stack:
        strangers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", job.port), timeout=60))
            for _ in range(bound + 100)
        ]
        # Excess connections are closed; a round is trained over the others.
        assert strangers[-1].recv(1) == b""
        assert client.push(client.header(0)).verdict == pb.PushReply.ACCEPTED
        assert client.push(client.header(1, client.offer(1).base_digest)).verdict == pb.PushReply.ACCEPTED
        assert client.offer(2).round == 2
        assert open_files(job.aggregator.pid) - before < bound + 64
    eventually("their descriptors are free again", lambda: job.status().completed_rounds == 1)


def test_half_a_handshake_has_an_end(client: HandMadeClient) -> None:
    seconds = dict(SERVER_OPTIONS)["grpc.server_handshake_timeout_ms"]
    assert seconds == 20_000
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", client.job.port), timeout=120) as stranger:
        assert stranger.recv(1) == b""
    assert time.monotonic() - started < 110


def test_headers_of_many_calls_cost_little_memory(client: HandMadeClient, tmp_path: Path) -> None:
    """An entry of HPACK's table that is referenced thousands of times in each call (RFC 7541, 7.3). Without a limit on
    open calls this took gigabytes."""
    job = client.job
    assert job.aggregator is not None
    assert client.offer().kind == pb.Offer.INITIALIZE
    request = _request(b"/isthmus.federation.v1alpha1.Federation/Control")
    entry = b"\x40\x03xbm" + length(4000) + b"b" * 4000
    before, calls = resident_megabytes(job.aggregator.pid), 4000
    with _tls(job, tmp_path) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(_SETTINGS, 0, 0))
        connection.settimeout(120)
        try:
            for number in range(calls):
                named = (entry if not number else b"") + b"\xbe" * 12_000
                connection.sendall(frame(_HEADERS, _END_HEADERS, 1 + 2 * number, request + named))
        except OSError:
            pass  # the aggregator has closed the connection
        assert resident_megabytes(job.aggregator.pid) - before < 400
    assert client.push(client.header(0)).verdict == pb.PushReply.ACCEPTED


def test_a_connection_has_few_calls_at_a_time(client: HandMadeClient, tmp_path: Path) -> None:
    """Memory for headers grows with connections: 16 with 32 calls each took 390 MB, and the same again each time
    that they were opened again."""
    with _tls(client.job, tmp_path) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(_SETTINGS, 0, 0))
        assert _settings(connection)[_MAX_CONCURRENT_STREAMS] == 8


def test_connections_of_one_certificate(federation: Callable[..., Federation], tmp_path: Path) -> None:
    """A client may open enough connections to reconnect. Those of another client are not closed."""
    job = federation(2, 1)
    job.start_aggregator()
    assert job.aggregator is not None
    path = b"/isthmus.federation.v1alpha1.Federation/Pull"
    call = frame(_HEADERS, _END_HEADERS, 1, _request(path)) + frame(_DATA, _END_STREAM, 1, bytes(5))
    with closing(HandMadeClient(job)) as honest, ExitStack() as stack:
        assert next(honest.messages).HasField("welcome")
        before, held = open_files(job.aggregator.pid), []
        for number in range(5 * CONNECTIONS_OF_EACH):
            held.append(stack.enter_context(_tls(job, tmp_path / str(number), 1)))
            held[-1].sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(_SETTINGS, 0, 0) + call)
        pid = job.aggregator.pid
        eventually("those beyond are ended", lambda: open_files(pid) - before <= CONNECTIONS_OF_EACH)
        assert "pool/1 has too many connections; its oldest one, from ipv4:127.0.0.1:" in job.log("aggregator")
        second = stack.enter_context(closing(HandMadeClient(job, 1)))
        assert honest.offer().kind == pb.Offer.INITIALIZE
        assert honest.push(honest.header(0)).verdict == pb.PushReply.ACCEPTED
        for each in (second, honest):
            assert each.push(each.header(1, each.offer(1).base_digest)).verdict == pb.PushReply.ACCEPTED
        job.wait_for(lambda status: status.phase == pb.FederationStatus.COMPLETE)
    job.wait_for_exit()


def test_long_headers_are_refused(client: HandMadeClient) -> None:
    with pytest.raises(grpc.RpcError) as error:
        list(client.stub.Pull(pb.PullRequest(), metadata=(("x-long", "v" * 9000),), timeout=60))
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def _request(path: bytes) -> bytes:
    """Return a call's headers."""
    fields = (
        (b":method", b"POST"), (b":scheme", b"https"), (b":path", path), (b":authority", SERVER_NAME.encode()),
        (b"te", b"trailers"), (b"content-type", b"application/grpc"),
    )  # fmt: skip
    return b"".join(literal(name, value) for name, value in fields)


def _settings(connection: ssl.SSLSocket) -> dict[int, int]:
    """Return the first frame that the server sends."""
    received = b""
    while len(received) < 9 or len(received) < 9 + int.from_bytes(received[:3]):
        received += connection.recv(4096)
    assert received[3] == _SETTINGS
    body = received[9 : 9 + int.from_bytes(received[:3])]
    return dict(struct.unpack(">HI", body[at : at + 6]) for at in range(0, len(body), 6))


def _tls(job: Federation, directory: Path, index: int = 0) -> ssl.SSLSocket:
    job.credentials(index).write(directory / "tls")
    context = ssl.create_default_context(cafile=str(directory / "tls/ca.crt"))
    context.load_cert_chain(directory / "tls/tls.crt", directory / "tls/tls.key")
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(
        socket.create_connection(("127.0.0.1", job.port), timeout=60), server_hostname=SERVER_NAME
    )
