"""Several clients in one job at a real Slurm."""

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb import bridge_pb2_grpc as rpc

from .slurm_site import Site, ensure, get, over, slurm, spec, tail, until

SCRIPT = """
echo "client $ISTHMUS_CLIENT job $SLURM_ARRAY_TASK_ID gpu $CUDA_VISIBLE_DEVICES in $PWD"
[ "$ISTHMUS_INDEX" != 1 ] || exit 3
trap 'echo warned; exit 0' TERM
while [ ! -e {go} ]; do sleep 0.1; done
"""


def test_two_clients_share_a_job_and_one_failure_does_not_end_the_other(site: Site, operator: rpc.BridgeStub) -> None:
    site.stop()
    site.settings["limits"] = {"gres": {"gpu": 2}}
    operator = site.start()
    key, go = site.key(), site.folder / "go"
    request = spec(replicas=3, total_clients=6, clients_per_job=2, command=["bash", "-c", SCRIPT.format(go=go)],
                   gres=[pb.GenericResource(name="gpu", count=1)])  # fmt: skip
    pool = ensure(operator, key, request)
    pool = until(lambda: (p := get(operator, key)).failed == 1 and p.running == 2 and p, "one failed, two run")
    assert (pool.tasks[0].index, pool.tasks[0].exit_code) == (1, 3)
    jobs = slurm("squeue", "-h", "-r", "-j", pool.slurm_job_id, "-o", "%K %T").split("\n")
    assert sorted(filter(None, jobs)) == ["0 RUNNING", "1 RUNNING"]
    until(lambda: tail(operator, key, 2), "the last client speaks")
    seen = [tail(operator, key, index).split(" in ") for index in range(3)]
    assert [where.rpartition("/")[2] for _, where in seen] == ["0", "1", "2"], "each in a directory of its own"
    # The job's GPUs are divided among its clients.
    assert sorted(who for who, _ in seen[:2]) == ["client 3 job 0 gpu 0", "client 4 job 0 gpu 1"]
    assert seen[2][0].startswith("client 5 job 1 gpu ")
    go.touch()
    pool = over(operator, key)
    assert (pb.Pool.Phase.Name(pool.phase), pool.succeeded, pool.failed) == ("FAILED", 2, 1)
