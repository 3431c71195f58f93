"""The life of a pool at a real Slurm."""

import json
import os
import re
import time

import grpc
import pytest

from isthmus_bridge.files.run_directory import AUDIT_FOLDER
from isthmus_contracts.identities import slurm_job_name
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb import bridge_pb2_grpc as rpc

from .slurm_site import Site, ensure, get, over, running, slurm, spec, tail, until, wait_for_output

SHOW = ["python3", "-c", "import os; print(os.getcwd()); [print(f'{k}={v}') for k, v in sorted(os.environ.items())]"]


def test_from_submission_to_success_with_the_promised_environment(site: Site, operator: rpc.BridgeStub) -> None:
    key = site.key()
    hostile = "a 'b' \"c\" $(touch owned) `id` %x\nsecond line"
    pool = ensure(operator, key, spec(command=SHOW, env={"GREETING": hostile, "run": "/x"}, environment="system"))
    assert pool.slurm_job_id.isdecimal() and pool.desired == 2
    pool = over(operator, key)
    assert (pb.Pool.Phase.Name(pool.phase), pool.succeeded, pool.failed) == ("SUCCEEDED", 2, 0)
    text = tail(operator, key, 1) + "\n"
    assert text.startswith(str(site.folder / "run" / key / "work" / "1") + "\n")
    for line in (
        "ISTHMUS_ENDPOINT=aggregator.example:7443", "ISTHMUS_SERVER_NAME=x.aggregator.isthmus.dev",
        f"ISTHMUS_TLS_DIR={site.folder}/run/{key}/tls", "ISTHMUS_JOB_UID=6f9619ff-8b86-d011-b42d-00cf4fc964ff",
        "ISTHMUS_JOB=default/fashion", "ISTHMUS_POOL=hpc", "ISTHMUS_INDEX=1", "ISTHMUS_POOL_SIZE=2", "ISTHMUS_CLIENT=4",
        "ISTHMUS_CLIENTS=5", "ISTHMUS_ATTEMPT=1000", "PYTHONUNBUFFERED=1", f"GREETING={hostile}", "run=/x",
    ):  # fmt: skip
        assert f"\n{line}\n" in text
    names = set(re.findall(r"^([A-Za-z_][A-Za-z0-9_]*)=", text, re.MULTILINE))
    # From Slurm 23.11 on, slurmd sets variables for the launchers of several MPIs.
    launchers = ("HYDRA_", "I_MPI_HYDRA_", "OMPI_MCA_", "PRTE_MCA_")
    own = {name for name in names if not name.startswith(("SLURM", "ISTHMUS_", *launchers))}
    # Isthmus', bash's, and those that slurmd adds; none from the bridge's or a login environment.
    assert own <= {
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "PYTHONUNBUFFERED", "VIRTUAL_ENV", "GREETING", "run", "PWD",
        "OLDPWD", "SHLVL", "_", "HOSTNAME", "TMPDIR", "ENVIRONMENT", "LC_CTYPE",
    }, own  # fmt: skip
    # They are removed once the pool's end is recorded.
    until(lambda: not (site.folder / "run" / key / "tls").exists(), "the credentials are gone with the pool")
    assert [path.name for path in (site.folder / "run" / key / "work" / "1").iterdir()] == [AUDIT_FOLDER]


@pytest.mark.parametrize(("clients_per_job", "told"), [(1, "[] 0 of 2"), (2, "[0] 1 of 2")])
def test_a_launchers_step_is_distinguished_from_the_clients_own(site: Site, clients_per_job: int, told: str) -> None:
    """The training script uses these values to refuse several processes that act as one client."""
    prefix = ["srun", "--overlap", "--overcommit", "--ntasks=2", "--mpi=none"]
    site.settings["environments"]["twice"] = {"prefix": prefix, "env_denied": []}
    operator, key = site.start(), site.key()
    command = ["sh", "-c", 'echo "[$ISTHMUS_STEP] $SLURM_STEP_ID of $SLURM_STEP_NUM_TASKS"']
    ensure(operator, key, spec(environment="twice", clients_per_job=clients_per_job, command=command))
    assert pb.Pool.Phase.Name(over(operator, key).phase) == "SUCCEEDED"
    said = [tail(operator, key, index) for index in (0, 1)]
    if clients_per_job == 1:
        assert said == [f"{told}\n{told}"] * 2
    else:  # Slurm numbers the two clients' steps in the order in which they come
        assert {line.split("]")[0] for text in said for line in text.splitlines()} == {"[0"}
        assert sorted(text.splitlines()[0] for text in said) == [told, told.replace("1", "2", 1)]


def test_a_failing_script_shows_why(site: Site, operator: rpc.BridgeStub) -> None:
    key = site.key()
    code = "import os\nprint('epoch 1')\nif os.environ['ISTHMUS_INDEX'] == '1':\n    raise ValueError('no such column')"
    ensure(operator, key, spec(command=["python3", "-c", code]))
    pool = over(operator, key)
    assert (pb.Pool.Phase.Name(pool.phase), pool.succeeded, pool.failed) == ("FAILED", 1, 1)
    assert pool.message == "1 of 2 tasks did not succeed; task 1: FAILED, exit code 1"
    (task,) = pool.tasks
    assert (task.index, task.state, task.exit_code, task.reason) == (1, "FAILED", 1, "NonZeroExitCode")
    assert task.node
    assert task.log_tail.splitlines()[0] == "epoch 1"
    assert task.log_tail.splitlines()[-1] == "ValueError: no such column"


def test_one_task_fails_while_the_other_lives(site: Site, operator: rpc.BridgeStub) -> None:
    key = site.key()
    script = 'if [ "$ISTHMUS_INDEX" = 0 ]; then kill -9 $$; fi; exec sleep 300'
    ensure(operator, key, spec(command=["sh", "-c", script]))
    # The first task may have failed before Slurm starts the other.
    pool = until(lambda: (p := get(operator, key)).failed == 1 and p.running == 1 and p, "one failed, the other runs")
    assert pb.Pool.Phase.Name(pool.phase) == "RUNNING"
    assert pool.tasks[0].exit_code == 137  # seen by the script's shell


def test_waiting_shows_slurms_reason(site: Site, operator: rpc.BridgeStub) -> None:
    key = site.key()
    pool = ensure(operator, key, spec(replicas=3, total_clients=6))
    running(operator, key, 3)
    slurm("scontrol", "requeuehold", pool.slurm_job_id)
    # A requeued task may first wait for another reason.
    pool = until(
        lambda: (p := get(operator, key)).queued == 3 and re.search("held|hold", p.reason, re.IGNORECASE) and p,
        "all wait, since they are held",
        180,
    )
    assert pb.Pool.Phase.Name(pool.phase) == "PENDING"


def test_a_requeued_task_runs_again_as_a_higher_attempt(site: Site, operator: rpc.BridgeStub) -> None:
    key = site.key()
    script = 'echo "attempt $ISTHMUS_ATTEMPT"; if [ "$ISTHMUS_ATTEMPT" = 7000 ]; then sleep 300; fi'
    pool = ensure(operator, key, spec(replicas=1, total_clients=4, attempt=7, command=["sh", "-c", script]))
    running(operator, key, 1)
    wait_for_output(operator, key, 0, "attempt 7000")
    slurm("scontrol", "requeue", f"{pool.slurm_job_id}_0")
    assert pb.Pool.Phase.Name(over(operator, key, 180).phase) == "SUCCEEDED"
    assert re.findall(r"attempt \d+", tail(operator, key, 0)) == ["attempt 7000", "attempt 7001"]


def test_the_warning_signal_reaches_the_script(site: Site, operator: rpc.BridgeStub) -> None:
    key = site.key()
    script = "trap 'echo partial work handed in; exit 0' TERM; echo ready; while :; do sleep 0.1; done"
    pool = ensure(operator, key, spec(replicas=1, total_clients=4, command=["sh", "-c", script]))
    wait_for_output(operator, key, 0, "ready")
    # This is the effect of --signal=B:TERM@60 a minute before the time limit: only the batch shell gets it.
    slurm("scancel", "--batch", "--signal=TERM", f"{pool.slurm_job_id}_0")
    assert pb.Pool.Phase.Name(over(operator, key).phase) == "SUCCEEDED"
    assert "partial work handed in" in tail(operator, key, 0)
    shown = slurm("scontrol", "show", "job", f"{pool.slurm_job_id}_0")
    assert "Comment=isthmus default/fashion/hpc for operator/prod" in shown


def test_cancel(site: Site, operator: rpc.BridgeStub) -> None:
    key = site.key()
    ensure(operator, key, spec())
    running(operator, key)
    operator.CancelPool(pb.CancelPoolRequest(key=key, reason="the FederatedJob was deleted"), timeout=60)
    pool = over(operator, key)
    assert (pb.Pool.Phase.Name(pool.phase), pool.message) == ("CANCELLED", "cancelled: the FederatedJob was deleted")
    assert site.arrays(key) == set()
    late = ensure(operator, key, spec())
    assert pb.Pool.Phase.Name(late.phase) == "CANCELLED"
    assert site.arrays(key) == set()


def test_cancel_before_the_request(site: Site, operator: rpc.BridgeStub) -> None:
    key = site.key()
    operator.CancelPool(pb.CancelPoolRequest(key=key), timeout=60)
    assert pb.Pool.Phase.Name(ensure(operator, key, spec()).phase) == "CANCELLED"
    assert site.arrays(key) == set()


def test_cancelled_by_a_stranger(site: Site, operator: rpc.BridgeStub) -> None:
    key = site.key()
    pool = ensure(operator, key, spec())
    running(operator, key)
    slurm("scancel", pool.slurm_job_id)
    pool = over(operator, key)
    assert (pb.Pool.Phase.Name(pool.phase), pool.message) == (
        "FAILED",
        "all tasks were cancelled, but not by the bridge",
    )


def test_a_refusal_shows_slurms_message(site: Site) -> None:
    site.settings["partitions"].append("no-such-partition")
    operator = site.start()
    key = site.key()
    pool = ensure(operator, key, spec(partition="no-such-partition"))
    assert pb.Pool.Phase.Name(pool.phase) == "FAILED"
    # sbatch's own line names the partition; Slurm's message comes last.
    assert pool.message == (
        "Slurm refused: invalid partition specified: no-such-partition; Invalid partition name specified"
    )
    assert site.arrays(key) == set()


def test_the_policy_is_enforced_and_strangers_are_refused(site: Site, operator: rpc.BridgeStub) -> None:
    key = site.key()
    with pytest.raises(grpc.RpcError) as caught:
        ensure(operator, key, spec(partition="gpu"))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert caught.value.details() == (
        "policy partitions: 'gpu' is not allowed for isthmus://operator/prod; allowed: main, debug"
    )
    with pytest.raises(grpc.RpcError) as caught:
        ensure(site.stub("nobody"), key, spec())
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(grpc.RpcError) as caught:
        get(site.foreign(), key)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    with grpc.insecure_channel(site.address) as plain, pytest.raises(grpc.RpcError) as caught:
        rpc.BridgeStub(plain).GetPool(pb.GetPoolRequest(key=key), timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert site.arrays(key) == set()


def test_sighup_applies_a_new_policy_unless_it_is_faulty(site: Site, operator: rpc.BridgeStub) -> None:
    site.reload({**site.settings, "partitions": ["main"]}, "the policy was reloaded; changed: partitions")
    with pytest.raises(grpc.RpcError, match="policy partitions: 'debug' is not allowed"):
        ensure(operator, site.key(), spec(partition="debug"))
    site.reload({**site.settings, "partitions": "main"}, "the policy was not reloaded: ")
    site.reload({**site.settings, "site": "other"}, "the policy was not reloaded: site: changes only with a restart")
    with pytest.raises(grpc.RpcError, match="policy partitions: 'debug' is not allowed"):
        ensure(operator, site.key(), spec(partition="debug"))
    assert ensure(operator, site.key(), spec(partition="main")).slurm_job_id


def test_a_change_is_reported_soon(site: Site, operator: rpc.BridgeStub) -> None:
    site.settings["slurm"]["poll_seconds"] = 1.5  # the default
    site.stop()
    operator = site.start()
    key = site.key()
    pool = ensure(operator, key, spec())
    running(operator, key)
    slurm("scancel", f"{pool.slurm_job_id}_0")
    until(lambda: f"{pool.slurm_job_id}_0" not in _active(key), "Slurm has ended the task")
    ended = time.monotonic()
    until(lambda: get(operator, key).failed > 0, "the bridge reports it")
    delay = time.monotonic() - ended
    # About one poll interval on an idle machine, and less than the bridge's longest pause on any.
    print(json.dumps({"reported_after": round(delay, 2)}))
    assert delay < 25


def _active(key: str) -> list[str]:
    return slurm("squeue", "-h", "-r", f"--name={slurm_job_name(key)}", "-o", "%i").split()


def test_doctor_and_status(site: Site, operator: rpc.BridgeStub) -> None:
    code, text = site.command("doctor")
    assert (code, "PROBLEM" in text) == (0, False), text
    assert (
        re.search(r"ok +CLI adapter \(in use\): works; Slurm \d+\.\d+", text)
        and "partitions: main, debug exist" in text
    )
    # The lab's partition `debug` has a limit of half an hour, and `urgent` is open to all users.
    limit = "partitions: limits.time_limit_seconds is 86400, but Slurm allows less (MaxTime): debug 1800 s"
    assert f"note     {limit}; larger pools never start" in text or "ISTHMUS_LAB" not in os.environ, text
    assert "its jobs may also use the partitions urgent" in text or "ISTHMUS_LAB" not in os.environ, text
    site.settings["partitions"].append("moon")
    site.write_policy()
    code, text = site.command("doctor")
    assert code == 1 and "PROBLEM  partitions: moon of the policy do not exist in Slurm, which has " in text
    key = site.key()
    job = ensure(operator, key, spec()).slurm_job_id

    def listed() -> list[str]:
        return next((line.split() for line in site.command("status")[1].splitlines() if key in line), [])

    # The row exists from the reservation on; the job id comes with sbatch's answer.
    row = until(lambda: (found := listed()) and job in found and found, "it is listed with its job")
    assert row[:2] == [key, "default/fashion/hpc"]


def test_the_site_describes_itself(site: Site, operator: rpc.BridgeStub) -> None:
    described = operator.DescribeSite(pb.DescribeSiteRequest(), timeout=60)
    assert re.match(r"\d+\.\d+", described.slurm_version)
    assert described.cluster
    assert list(described.environments) == ["plain", "system"]
