"""Never two arrays for one key: the bridge dies, and sbatch is slow, hangs, or loses its answer; Slurm is real."""

import threading

import grpc
import pytest

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb import bridge_pb2_grpc as rpc

from .slurm_site import Site, ensure, ensure_at_dying_bridge, get, over, restart_while_submitting, running, spec, until


def test_the_same_request_twice_is_one_array(site: Site, operator: rpc.BridgeStub) -> None:
    key, wanted = site.key(), spec()
    first = ensure(operator, key, wanted)
    second = ensure(operator, key, wanted)
    assert site.arrays(key) == {first.slurm_job_id} == {second.slurm_job_id}
    with pytest.raises(grpc.RpcError) as caught:
        ensure(operator, key, spec(replicas=1))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "differs in: replicas" in (caught.value.details() or "")


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_the_bridge_dies_between_two_requests(site: Site, operator: rpc.BridgeStub, end: str) -> None:
    key, wanted = site.key(), spec()
    first = ensure(operator, key, wanted)
    getattr(site, end)()
    operator = site.start()
    second = ensure(operator, key, wanted)
    assert site.arrays(key) == {first.slurm_job_id} == {second.slurm_job_id}
    running(operator, key)
    # The first answer may be so late that it includes running tasks, so wait for a new event.
    cancelled = operator.CancelPool(pb.CancelPoolRequest(key=key), timeout=60)
    assert cancelled.version > first.version


def test_the_bridge_dies_while_a_pool_ends(site: Site, operator: rpc.BridgeStub) -> None:
    key = site.key()
    ensure(operator, key, spec(command=["sh", "-c", 'exit "$ISTHMUS_INDEX"']))
    site.kill()
    until(lambda: not site.arrays(key), "the tasks have ended")
    pool = over(site.start(), key)
    assert (pb.Pool.Phase.Name(pool.phase), pool.succeeded, pool.failed) == ("FAILED", 1, 1)
    # They are removed once the pool's end is recorded.
    until(lambda: not (site.folder / "run" / key / "tls").exists(), "the credentials are gone with the pool")


@pytest.mark.parametrize("mode", ["slow", "hang-after"])
def test_the_bridge_dies_while_sbatch_runs(site: Site, operator: rpc.BridgeStub, mode: str) -> None:
    """In mode slow the orphan submits after the bridge is back; in hang-after it has submitted, and the answer was
    lost."""
    key, wanted = site.key(), spec()
    operator = restart_while_submitting(site, operator, key, wanted, mode)
    assert site.arrays(key) == {get(operator, key).slurm_job_id}


@pytest.mark.parametrize("mode", ["hang-after", "fail-after"])
def test_sbatch_submits_and_its_answer_is_lost(site: Site, mode: str) -> None:
    site.settings["slurm"]["command_timeout_seconds"] = 3
    operator = site.start()
    key, wanted = site.key(), spec()
    site.mode(mode)
    ensure(operator, key, wanted)
    site.mode("")
    running(operator, key)
    ensure(operator, key, wanted)
    assert site.arrays(key) == {get(operator, key).slurm_job_id}


def test_sbatch_hangs_without_submitting(site: Site) -> None:
    site.settings["slurm"]["command_timeout_seconds"] = 2
    operator = site.start()
    key, wanted = site.key(), spec()
    site.mode("hang-before")
    ensure(operator, key, wanted)
    # While the killed sbatch is ending, the message says that it still runs.
    until(
        lambda: (p := get(operator, key)).phase == pb.Pool.UNKNOWN and "did not answer in time" in p.message,
        "the bridge says that sbatch hung",
    )
    site.mode("")
    running(operator, key)
    assert site.arrays(key) == {get(operator, key).slurm_job_id}


def test_cancel_of_a_submission_in_doubt(site: Site) -> None:
    site.settings["slurm"]["command_timeout_seconds"] = 2
    operator = site.start()
    key = site.key()
    site.mode("hang-after")
    threading.Thread(target=ensure_at_dying_bridge, args=(operator, key, spec()), daemon=True).start()
    # Ask Slurm itself: a slow sbatch is killed before it can report that it is done.
    until(lambda: site.arrays(key), "sbatch has submitted")
    operator.CancelPool(pb.CancelPoolRequest(key=key), timeout=60)
    assert pb.Pool.Phase.Name(over(operator, key).phase) == "CANCELLED"
    assert site.arrays(key) == set()


def test_a_lost_journal_finds_its_arrays_again(site: Site, operator: rpc.BridgeStub) -> None:
    key, wanted = site.key(), spec()
    first = ensure(operator, key, wanted)
    site.kill()
    for path in (site.folder / "run").glob("journal.db*"):
        path.unlink()
    operator = site.start()
    ensure(operator, key, wanted)
    running(operator, key)
    assert site.arrays(key) == {first.slurm_job_id} == {get(operator, key).slurm_job_id}
