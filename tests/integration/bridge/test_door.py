"""Silent connections, and handshakes that never end: they are bounded, and honest callers get through."""

import datetime as dt
import os
import resource
import select
import shutil
import signal
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from isthmus_bridge import server
from isthmus_bridge.network import handshake_guard
from isthmus_bridge.network.handshake_guard import MAX_CONNECTIONS, MAX_HANDSHAKES, TlsRecords, connection_limits
from isthmus_bridge.server import Bridge, ServerError, serve
from isthmus_contracts.identities import operator_identity
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb import bridge_pb2_grpc as rpc
from isthmus_contracts.wire.pki import Authority, Credentials
from isthmus_contracts.wire.transport import channel
from tests.support.fake_slurm import KEY, FakeSlurm, spec

from .test_service import eventually, site

DAY = dt.timedelta(days=1)


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def authority() -> Authority:
    return Authority.create("site", DAY)


@pytest.fixture
def bridge(many_files: None, tmp_path: Path, authority: Authority) -> Iterator[Bridge]:
    authority.issue("localhost", DAY, hosts=["localhost"]).write(tmp_path / "tls")
    running = Bridge(site(tmp_path), FakeSlurm(time.time))
    running.start()
    yield running
    running.stop()


@pytest.fixture
def credentials(authority: Authority) -> Credentials:
    return authority.issue("prod", DAY, uris=[operator_identity("prod")])


def ended(connections: list[socket.socket]) -> int:
    """Return how many of the connections the bridge has closed."""
    readable, _, _ = select.select(connections, [], [], 0)
    return len(readable)


def test_silent_connections_leave_room_for_an_honest_caller(bridge: Bridge, credentials: Credentials) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(channel(f"127.0.0.1:{bridge.port}", credentials, "localhost"))
        rpc.BridgeStub(first).EnsurePool(pb.EnsurePoolRequest(key=KEY, spec=spec()), timeout=60)
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", bridge.port), timeout=60)) for _ in range(400)
        ]
        for half in silent[::2]:
            # An incomplete ClientHello that is never completed.
            with_header = b"\x16\x03\x01\x02\x00\x01"
            try:
                half.sendall(with_header)
            except OSError:
                continue  # the bridge has already closed it
        second = stack.enter_context(channel(f"127.0.0.1:{bridge.port}", credentials, "localhost"))
        began = time.monotonic()
        assert rpc.BridgeStub(second).GetPool(pb.GetPoolRequest(key=KEY), timeout=60).phase == pb.Pool.PENDING
        # The connection opened before the others works too.
        assert rpc.BridgeStub(first).GetPool(pb.GetPoolRequest(key=KEY), timeout=60).phase == pb.Pool.PENDING
        assert time.monotonic() - began < handshake_guard.HANDSHAKE_SECONDS, "no wait for the strangers' time limit"
        assert ended(silent) >= 400 - MAX_HANDSHAKES
        assert ended(silent[-8:]) == 0, "the oldest are ended first"


def test_a_handshake_has_an_end(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake_guard, "HANDSHAKE_SECONDS", 0.5)
    for said in (b"", b"\x16\x03\x01\x02\x00\x01"):
        with socket.create_connection(("127.0.0.1", bridge.port), timeout=60) as stranger:
            stranger.sendall(said)
            assert stranger.recv(1) == b""


def test_a_connection_without_a_certificate_is_closed(bridge: Bridge) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", bridge.port), timeout=60) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
        context.wrap_socket(plain) as stranger,
    ):
        stranger.recv(1)
        raise ConnectionError("closed without an alert")


def test_a_connection_without_tls_is_closed(bridge: Bridge) -> None:
    with socket.create_connection(("127.0.0.1", bridge.port), timeout=60) as stranger:
        stranger.sendall(b"\x17\x03\x03\x00\x10" + bytes(16))
        try:
            while stranger.recv(100):
                pass
        except ConnectionError:
            pass
    with grpc.insecure_channel(f"127.0.0.1:{bridge.port}") as plain, pytest.raises(grpc.RpcError) as caught:
        rpc.BridgeStub(plain).GetPool(pb.GetPoolRequest(key=KEY), timeout=30)
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_a_port_that_is_taken(many_files: None, tmp_path: Path, authority: Authority, bridge: Bridge) -> None:
    (tmp_path / "another").mkdir()
    authority.issue("localhost", DAY, hosts=["localhost"]).write(tmp_path / "another" / "tls")
    taken = site(tmp_path / "another").model_copy(update={"listen": f"127.0.0.1:{bridge.port}"})
    with pytest.raises(ServerError, match=rf"cannot serve at 127\.0\.0\.1:{bridge.port}: .*in use"):
        Bridge(taken, FakeSlurm(time.time)).start()


@pytest.fixture
def short() -> Iterator[Path]:
    """Yield a directory with a short path, because ``tmp_path`` may be too long for the name of a socket."""
    with tempfile.TemporaryDirectory(prefix="door-", dir="/tmp") as folder:
        yield Path(folder)


def test_the_socket_behind_the_door_is_touched_regularly(
    many_files: None, tmp_path: Path, short: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cleaners of /tmp (systemd-tmpfiles after ten days, PrivateTmp or not) remove files that have not been touched."""
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    monkeypatch.setattr(server, "_CERTIFICATE_SECONDS", 0.05)
    authority.issue("localhost", DAY, hosts=["localhost"]).write(tmp_path / "tls")
    running = Bridge(site(tmp_path), FakeSlurm(time.time))
    running.start()
    try:
        near = sockets_in(short)[0]
        long_ago = time.time() - 11 * 86400
        for path in (near, near.parent):
            os.utime(path, (long_ago, long_ago))
        eventually(lambda: min(near.stat().st_mtime, near.parent.stat().st_mtime) > long_ago + 86400)
    finally:
        running.stop()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("isthmus-bridge-*", r"/isthmus-bridge-\w+/bridge\.sock was removed, and no caller can connect without it;"),
        ("journal.db", r"/journal\.db was removed, and is written again;"),
    ],
)
def test_a_bridge_whose_files_were_removed_ends_and_says_so(
    many_files: None, tmp_path: Path, short: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch,
    what: str, words: str,
) -> None:  # fmt: skip
    """Its socket in /tmp or its journal is removed.

    systemd restarts the bridge, which then has the files again.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(server, "slurm_adapter", lambda *_: FakeSlurm(time.time))
    authority.issue("localhost", DAY, hosts=["localhost"]).write(tmp_path / "tls")
    policy = site(tmp_path)

    def clean() -> None:
        # The status file exists once the bridge serves.
        eventually(policy.status_path.exists)
        (found,) = [*short.glob(what), *tmp_path.glob(what)]
        (shutil.rmtree if found.is_dir() else Path.unlink)(found)

    cleaner = threading.Thread(target=clean)
    cleaner.start()
    with pytest.raises(ServerError, match=rf"({short}|{tmp_path}){words}"):
        serve(policy, lambda: policy)
    cleaner.join()
    # Everything else was stopped properly, and the journal exists and is free for the next bridge.
    assert policy.journal_path.exists()
    Bridge(policy, FakeSlurm(time.time)).stop()


def sockets_in(folder: Path) -> list[Path]:
    """Return the sockets that bridges have created below the directory."""
    return list(folder.glob("isthmus-bridge-*/bridge.sock"))


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_handshake_is_over_with_the_first_whole_protected_record(step: int) -> None:
    hello = b"\x16\x03\x01\x00\x04" + b"\x17\x03\x03\x00"  # looks like a protected record, but is not
    last = b"\x17\x03\x03\x00\x05abcde"
    stream = hello + b"\x14\x03\x03\x00\x01\x01" + last
    records = TlsRecords()
    for at in range(0, len(stream) - 1, step):
        records.feed(stream[at : min(at + step, len(stream) - 1)])
    assert not records.handshake_done
    records.feed(stream[-1:])
    assert records.handshake_done


@pytest.mark.parametrize(("files", "most"), [(256, 48), (1024, MAX_CONNECTIONS), (64, 8)])
def test_room_is_kept_for_the_bridges_own_files(files: int, most: int) -> None:
    connections, handshaking = connection_limits(files)
    assert connections == most and handshaking <= min(MAX_HANDSHAKES, connections // 2)
