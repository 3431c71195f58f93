"""The service over real gRPC with mutual TLS; only Slurm is fake."""

import datetime as dt
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from isthmus_bridge.audit.chain import verify
from isthmus_bridge.parties import signing_root
from isthmus_bridge.policy.policy import Policy
from isthmus_bridge.pools.journal import Entry, Journal, State
from isthmus_bridge.pools.observation import Observation, TaskObservation
from isthmus_bridge.pools.pool_status import to_pool
from isthmus_bridge.server import Bridge
from isthmus_contracts.identities import operator_identity
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb import bridge_pb2_grpc as rpc
from isthmus_contracts.wire.parties import Trust, new_root
from isthmus_contracts.wire.pki import Authority, Credentials
from isthmus_contracts.wire.transport import channel
from tests.support.fake_slurm import KEY, NAME, FakeSlurm, policy, spec

DAY = dt.timedelta(days=1)
Connect = Callable[[str], rpc.BridgeStub]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("site", DAY)


@pytest.fixture
def slurm() -> FakeSlurm:
    return FakeSlurm(time.time)


def site(root: Path, **changes: object) -> Policy:
    slurm = {"poll_seconds": 0.1, "absence_seconds": 1, "absence_lookups": 2}
    return policy(root, listen="127.0.0.1:0", metrics_listen=None, slurm=slurm, **changes)


@pytest.fixture
def bridge(tmp_path: Path, authority: Authority, slurm: FakeSlurm) -> Iterator[Bridge]:
    authority.issue("localhost", DAY, hosts=["localhost"]).write(tmp_path / "tls")
    running = Bridge(site(tmp_path), slurm)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def connect(bridge: Bridge, authority: Authority) -> Iterator[Connect]:
    channels: list[grpc.Channel] = []

    def open_one(cluster: str = "prod", by: Authority = authority) -> rpc.BridgeStub:
        identity = cluster if ":" in cluster else operator_identity(cluster)
        credentials = by.issue(cluster, DAY, uris=[identity])
        if by is not authority:
            credentials = type(credentials)(authority.certificate, credentials.certificate, credentials.key)
        channels.append(channel(f"127.0.0.1:{bridge.port}", credentials, "localhost"))
        return rpc.BridgeStub(channels[-1])

    yield open_one
    for one in channels:
        one.close()


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    assert isinstance(error, grpc.Call)
    return error.code(), error.details() or ""


def ensure(stub: rpc.BridgeStub, key: str = KEY, **changes: object) -> pb.Pool:
    return stub.EnsurePool(pb.EnsurePoolRequest(key=key, spec=spec(**changes)), timeout=60)


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def test_a_pools_life(connect: Connect, slurm: FakeSlurm) -> None:
    stub = connect("prod")
    pool = ensure(stub)
    assert (pool.slurm_job_id, pool.desired) == ("100", 3)
    assert ensure(stub).slurm_job_id == "100"
    slurm.arrays[0].states = ["RUNNING"] * 3
    eventually(lambda: stub.GetPool(pb.GetPoolRequest(key=KEY)).phase == pb.Pool.RUNNING)
    cancelled = stub.CancelPool(pb.CancelPoolRequest(key=KEY, reason="done"), timeout=60)
    assert (cancelled.phase, cancelled.message) == (pb.Pool.CANCELLED, "cancelled: done")
    assert slurm.submissions == 1


def test_status_codes(connect: Connect) -> None:
    stub = connect("prod")
    assert refused(lambda: ensure(stub, key="x"))[0] is grpc.StatusCode.INVALID_ARGUMENT
    code, details = refused(lambda: ensure(stub, partition="gpu"))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert details == "policy partitions: 'gpu' is not allowed for isthmus://operator/prod; allowed: main, debug"
    ensure(stub)
    code, details = refused(lambda: ensure(stub, replicas=2))
    assert (code, "differs in: replicas" in details) == (grpc.StatusCode.FAILED_PRECONDITION, True)
    assert refused(lambda: stub.GetPool(pb.GetPoolRequest(key="no-such-pool")))[0] is grpc.StatusCode.NOT_FOUND


def test_log_lines_of_denied_requests_name_key_pool_and_caller(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        refused(lambda: ensure(connect("prod"), partition="gpu"))
        refused(lambda: connect("nobody").GetPool(pb.GetPoolRequest(key="not\na key")))
        refused(lambda: connect("nobody").DescribeSite(pb.DescribeSiteRequest()))
    lines = [record.__dict__ for record in caplog.records if record.message.startswith("denied: ")]
    names = ("method", "key", "pool", "caller")
    assert [{name: line[name] for name in names if name in line} for line in lines] == [
        {"method": "EnsurePool", "key": KEY, "pool": "default/fashion/lumi", "caller": "isthmus://operator/prod"},
        {"method": "GetPool", "key": "not a key", "caller": "isthmus://operator/nobody"},
        {"method": "DescribeSite", "caller": "isthmus://operator/nobody"},
    ]


def test_strangers_are_refused(connect: Connect, bridge: Bridge) -> None:
    code, details = refused(lambda: connect("nobody").DescribeSite(pb.DescribeSiteRequest()))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert details == "policy identities: 'isthmus://operator/nobody' is not known at this site"
    elsewhere = Authority.create("another", DAY)
    stranger = connect("prod", elsewhere)  # type: ignore[call-arg]
    assert (
        refused(lambda: stranger.DescribeSite(pb.DescribeSiteRequest(), timeout=60))[0] is grpc.StatusCode.UNAVAILABLE
    )
    with grpc.insecure_channel(f"127.0.0.1:{bridge.port}") as plain:
        stub = rpc.BridgeStub(plain)
        assert (
            refused(lambda: stub.DescribeSite(pb.DescribeSiteRequest(), timeout=60))[0] is grpc.StatusCode.UNAVAILABLE
        )


def test_callers_see_only_their_own(connect: Connect) -> None:
    ensure(connect("prod"))
    other = connect("other")
    assert refused(lambda: other.GetPool(pb.GetPoolRequest(key=KEY)))[0] is grpc.StatusCode.NOT_FOUND
    assert refused(lambda: other.CancelPool(pb.CancelPoolRequest(key=KEY)))[0] is grpc.StatusCode.NOT_FOUND
    assert refused(lambda: list(other.TailLog(pb.TailLogRequest(key=KEY))))[0] is grpc.StatusCode.NOT_FOUND
    assert refused(lambda: ensure(other))[0] is grpc.StatusCode.ALREADY_EXISTS


def test_a_caller_that_the_policy_no_longer_names_is_refused(connect: Connect, bridge: Bridge, tmp_path: Path) -> None:
    stub = connect("prod")
    ensure(stub)
    bridge.current_policy.replace(site(tmp_path, identities=[{"uri": "isthmus://operator/other"}]))
    code, details = refused(lambda: stub.GetPool(pb.GetPoolRequest(key=KEY)))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert details == "policy identities: 'isthmus://operator/prod' is not known at this site"


def test_a_pool_that_cannot_be_shown_hides_no_other(
    connect: Connect, bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub, bad = connect("prod"), "b" * 32
    ensure(stub, key=bad)
    monkeypatch.setattr("isthmus_bridge.pools.status_file.to_pool", _all_but(bad))
    ensure(stub)
    status = bridge.current_policy.policy.status_path
    eventually(lambda: status.exists() and KEY in status.read_text())
    assert bad not in status.read_text()


def _all_but(key: str) -> Callable[[Entry], pb.Pool]:
    def told(entry: Entry) -> pb.Pool:
        if entry.key == key:
            raise ValueError("Value out of range: 99999999999")
        return to_pool(entry)

    return told


def test_a_forged_exit_code_in_an_older_journal_is_not_shown() -> None:
    task = TaskObservation("FAILED", exit_code=99999999999)
    entry = Entry(KEY, "x", State.SUBMITTED, spec=spec().SerializeToString(), observation=Observation({0: task}))
    assert [each.exit_code for each in to_pool(entry).tasks] == [-1]


def test_tails_are_bounded(connect: Connect, bridge: Bridge, tmp_path: Path) -> None:
    stub = connect("prod")
    ensure(stub)
    log = tmp_path / "run" / KEY / "logs" / "1.log"
    log.write_bytes(b"".join(b"%07d\n" % number for number in range(100_000)) + b"\xff end\n")

    def tail(lines: int) -> list[str]:
        chunks = stub.TailLog(pb.TailLogRequest(key=KEY, index=1, lines=lines))
        return b"".join(chunk.data for chunk in chunks).decode().splitlines()

    assert tail(2) == ["0099999", "\ufffd end"]
    assert len(tail(0)) == 20
    assert len(tail(4_000_000)) == 1000
    assert (
        refused(lambda: list(stub.TailLog(pb.TailLogRequest(key=KEY, index=3))))[0] is grpc.StatusCode.INVALID_ARGUMENT
    )
    log.write_bytes(b"")
    assert tail(5) == [], "it has said nothing yet"
    log.unlink()
    assert tail(5) == [f"isthmus: there is no log of task 1: it has not started, or {log} was removed"]
    log.symlink_to("/etc/passwd")
    (line,) = tail(5)
    assert line.startswith("isthmus: the log of task 1 cannot be read: ") and "root:" not in line
    log.unlink()
    log.mkdir()
    assert tail(5)[0].startswith("isthmus: the log of task 1 cannot be read: ")


def test_describe(connect: Connect) -> None:
    site = connect("prod").DescribeSite(pb.DescribeSiteRequest())
    assert (site.name, site.slurm_version, site.cluster) == ("test", "22.05.8", "fake")
    assert (list(site.partitions), list(site.environments)) == (["main", "debug"], ["plain"])


def test_the_site_shows_its_root_and_refuses_what_the_policy_does_not_protect(
    tmp_path: Path, authority: Authority, slurm: FakeSlurm
) -> None:
    authority.issue("localhost", DAY, hosts=["localhost"]).write(tmp_path / "tls")
    root, _ = signing_root.make(tmp_path)
    signing_root.install(tmp_path, tmp_path / "tls")
    rules = {"secure_aggregation": {"required": True, "min_parties": 2, "roots": {"cloud": new_root()[1]}}}
    bridge = Bridge(site(tmp_path, privacy=rules), slurm)
    bridge.start()
    try:
        operator = authority.issue("prod", DAY, uris=[operator_identity("prod")])
        with channel(f"127.0.0.1:{bridge.port}", operator, "localhost") as open_channel:
            stub = rpc.BridgeStub(open_channel)
            assert stub.DescribeSite(pb.DescribeSiteRequest(), timeout=60).signing_root == root
            assert refused(lambda: ensure(stub)) == (
                grpc.StatusCode.PERMISSION_DENIED,
                "policy privacy.secure_aggregation.required: privacy.secureAggregation is not set in the manifest; this"
                " site takes no job without it",
            )
            ensure(stub, privacy=pb.Privacy(secure_aggregation=True))
    finally:
        bridge.stop()
    assert Trust.read(tmp_path / "run" / KEY / "tls").required
    lines = (tmp_path / "audit.jsonl").read_bytes().splitlines()
    assert verify(lines).faults == ()
    policy_line, denied, accepted = map(json.loads, lines)
    assert (policy_line["event"], policy_line["site"]) == ("policy", "test")
    assert (denied["event"], denied["rule"]) == ("denied", "privacy.secure_aggregation.required")
    assert (denied["job"], denied["pool"], denied["key"]) == ("default/fashion", "lumi", KEY)
    assert (accepted["event"], accepted["privacy"]) == ("accepted", {"secure_aggregation": True})
    assert accepted["caller"] == denied["caller"] == operator_identity("prod")


def test_many_requests_for_one_key_at_once_submit_once(connect: Connect, slurm: FakeSlurm) -> None:
    stub = connect("prod")
    ids: list[str] = []
    threads = [threading.Thread(target=lambda: ids.append(ensure(stub).slurm_job_id)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ids == ["100"] * 16
    assert len(slurm.living(NAME)) == 1


def test_renewed_credentials_reach_the_tasks_of_a_living_pool(
    connect: Connect, bridge: Bridge, slurm: FakeSlurm, tmp_path: Path
) -> None:
    stub = connect("prod")
    ensure(stub)
    tls = tmp_path / "run" / KEY / "tls"
    tls = tls if tls.exists() else next(tmp_path.glob(f"*/{KEY}/tls"))
    before = {path.name: path.stat().st_ino for path in tls.iterdir()}
    fresh = Authority.create("job", DAY).issue("pool", DAY, uris=["isthmus://job/x/pool/y"])
    request = pb.RenewCredentialsRequest(
        key=KEY, ca_certificate=fresh.ca, certificate=fresh.certificate, private_key=fresh.key
    )
    assert stub.RenewCredentials(request, timeout=60).slurm_job_id == "100"
    assert Credentials.read(tls) == fresh
    for path in tls.iterdir():
        # Each file was replaced atomically, and is private to its owner.
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.stat().st_ino != before[path.name]
    assert slurm.submissions == 1
    # Other callers, malformed certificates and pools that have ended are refused.
    other = connect("test")
    assert refused(lambda: other.RenewCredentials(request, timeout=60))[0] in (
        grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED,
    )  # fmt: skip
    broken = pb.RenewCredentialsRequest(key=KEY, ca_certificate=b"x", certificate=b"y", private_key=b"z")
    code, details = refused(lambda: stub.RenewCredentials(broken, timeout=60))
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "ca_certificate: is not PEM")
    stub.CancelPool(pb.CancelPoolRequest(key=KEY), timeout=60)
    eventually(lambda: not tls.exists())
    assert stub.RenewCredentials(request, timeout=60).phase == pb.Pool.CANCELLED
    assert not tls.exists()


def test_a_pool_contains_the_sites_time(connect: Connect) -> None:
    assert abs(ensure(connect("prod")).now - time.time()) < 60


def test_the_bridges_own_certificate_is_renewed_while_it_runs(
    bridge: Bridge, authority: Authority, tmp_path: Path
) -> None:
    """Without restart or signal, new connections use the newest files, and trust the CA in them."""

    def describe(by: Authority, trusted: bytes) -> str:
        own = by.issue("prod", DAY, uris=[operator_identity("prod")])
        credentials = Credentials(trusted, own.certificate, own.key)
        with channel(f"127.0.0.1:{bridge.port}", credentials, "localhost") as connection:
            return rpc.BridgeStub(connection).DescribeSite(pb.DescribeSiteRequest(), timeout=60).name

    assert describe(authority, authority.certificate)
    newer = Authority.create("site", DAY)
    own = newer.issue("localhost", DAY, hosts=["localhost"])
    Credentials(newer.certificate, own.certificate, own.key).write(tmp_path / "tls")
    assert describe(newer, newer.certificate)
    assert refused(lambda: describe(authority, newer.certificate))[0] is grpc.StatusCode.UNAVAILABLE


def test_a_full_journal_disk_is_a_temporary_error(
    bridge: Bridge, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Journal, entry: Entry) -> Entry:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(Journal, "insert", full)
        with pytest.raises(grpc.RpcError) as caught:
            connect("prod").EnsurePool(pb.EnsurePoolRequest(key=KEY, spec=spec()), timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "the site's bridge cannot write its journal: database or disk is full"
    assert connect("prod").EnsurePool(pb.EnsurePoolRequest(key=KEY, spec=spec()), timeout=60).key == KEY
