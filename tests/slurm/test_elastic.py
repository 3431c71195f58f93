"""A pool that grows and shrinks in place at a real Slurm."""

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb import bridge_pb2_grpc as rpc

from .slurm_site import Site, ensure, get, over, running, slurm, spec, tail, until

# Prints its identity and process id, which show whether the same process continues.
SCRIPT = 'echo "$ISTHMUS_INDEX of $ISTHMUS_POOL_SIZE is client $ISTHMUS_CLIENT, pid $$"; exec sleep 300'


def jobs(pool: pb.Pool) -> dict[str, str]:
    """Return Slurm's job id of each live task of the array."""
    lines = slurm("squeue", "-h", "-r", "-j", pool.slurm_job_id, "-o", "%K %A", check=False).splitlines()
    return dict(line.split() for line in lines)


def said(operator: rpc.BridgeStub, key: str, index: int) -> str:
    return str(until(lambda: tail(operator, key, index), "the client speaks"))


def test_it_grows_and_shrinks_and_the_clients_that_stay_notice_nothing(site: Site, operator: rpc.BridgeStub) -> None:
    first, more = site.key(), site.key()
    wanted = spec(replicas=3, total_clients=9, pool_size=5, command=["sh", "-c", SCRIPT])
    pool = ensure(operator, first, wanted)
    running(operator, first, 3)
    before = jobs(pool), [said(operator, first, index) for index in range(3)]
    # A second array makes the pool larger.
    wanted.attempt, wanted.replicas, wanted.first_index, wanted.first_client = 2, 2, 3, 6
    grown = ensure(operator, more, wanted)
    running(operator, more, 2)
    assert said(operator, more, 1).startswith("4 of 5 is client 7, pid ")
    # The pool shrinks from the end, even if the bridge is killed during it.
    operator.CancelPool(pb.CancelPoolRequest(key=more), timeout=60)
    operator.ShrinkPool(pb.ShrinkPoolRequest(key=first, replicas=2), timeout=60)
    site.kill()
    operator = site.start()
    assert pb.Pool.Phase.Name(over(operator, more).phase) == "CANCELLED"
    until(lambda: set(jobs(pool)) == {"0", "1"} and not jobs(grown), "only the first two are left")
    pool = get(operator, first)
    assert (pb.Pool.Phase.Name(pool.phase), pool.desired, pool.running, pool.failed) == ("RUNNING", 2, 2, 0)
    assert jobs(pool) == {index: job for index, job in before[0].items() if index != "2"}
    assert [said(operator, first, index) for index in range(2)] == before[1][:2]
    # A repeated request changes nothing.
    again = spec(replicas=3, total_clients=9, pool_size=5, command=["sh", "-c", SCRIPT])
    assert ensure(operator, first, again).running == 2
    operator.CancelPool(pb.CancelPoolRequest(key=first), timeout=60)
    assert pb.Pool.Phase.Name(over(operator, first).phase) == "CANCELLED"
