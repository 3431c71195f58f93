"""Command lines of the CLI adapter, and handling of answers, without Slurm."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from errno import ECONNRESET, EHOSTUNREACH, EIO, ENETUNREACH, EPIPE
from pathlib import Path

import pytest

from isthmus_bridge.slurm.cli import CliAdapter, arguments, cluster_of, submitted
from isthmus_bridge.slurm.command import CommandOutputTooLong, CommandTimeout, Result, run
from isthmus_bridge.slurm.model import Gres, Patience, SlurmError, Submission, SubmissionAmbiguous, SubmissionRefused


def submission(directory: Path, **changes: object) -> Submission:
    fields: dict[str, object] = {
        "name": "isthmus-x", "script": directory / "batch.sh", "directory": directory, "output": f"{directory}/%a.log",
        "tasks": 8, "comment": "isthmus default/fashion/lumi", "partition": "main", "account": "", "qos": "",
        "time_limit_seconds": 3601, "warning_seconds": 60, "cpus_per_task": 4, "memory_mib": 512,
    }  # fmt: skip
    fields.update(changes)
    return Submission(**fields)  # type: ignore[arg-type]


def test_clients_that_share_a_job_are_warned_themselves(tmp_path: Path) -> None:
    assert {"--ntasks=1", "--signal=B:TERM@60"} <= set(arguments(submission(tmp_path)))
    assert {"--ntasks=4", "--signal=TERM@60"} <= set(arguments(submission(tmp_path, steps=4)))


def test_arguments() -> None:
    listed = arguments(
        submission(Path("/run/x"), account="p1", qos="q", gres=(Gres("gpu", "a100", 2), Gres("nic", "", 1)))
    )
    assert listed[-1] == "/run/x/batch.sh"
    assert all(argument.startswith("--") for argument in listed[:-1])
    for expected in (
        "--array=0-7", "--job-name=isthmus-x", "--time=61", "--mem=512M", "--cpus-per-task=4", "--signal=B:TERM@60",
        "--partition=main", "--account=p1", "--qos=q", "--gres=gpu:a100:2,nic:1", "--export=ALL", "--requeue",
        "--output=/run/x/%a.log",
    ):  # fmt: skip
        assert expected in listed
    assert not any(
        argument.startswith(("--account", "--qos", "--gres")) for argument in arguments(submission(Path("/x")))
    )


NO = "sbatch: error: Batch job submission failed:"
CONFIGURATION = "Requested node configuration is not available"
NONE, HOUR, QUEUE = Patience
ACCOUNT_LIMIT = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


def failed(message: str, status: int = 1) -> Result:
    return Result(status, "", message)


@pytest.mark.parametrize(
    ("output", "cluster"),
    [
        ("17\n", ""),
        ("17;beta\n", "beta"),
        # Output of wrappers at TACC, UMass, NIH and VSC, which print a greeting or drop --parsable.
        ("Welcome to the Stampede3 Supercomputer; enjoy\n--> Verifying valid jobname...OK\n17;beta\n", "beta"),
        ("17;beta\nThank you; your balance is 12\n7 hours left\n", "beta"),
        ("Submitted batch job 17\n", ""),
        ("INFO: 128 GB will require a larger node\nSubmitted batch job 17 on cluster beta\n", "beta"),
        ("Submitted batch job 17\n17\n", ""),
    ],
)
def test_accepted(output: str, cluster: str) -> None:
    result = Result(0, output, "sbatch: warning: whatever")
    assert (submitted(result), cluster_of(result)) == (17, cluster)


@pytest.mark.parametrize(
    ("message", "patience"),
    [
        (f"{NO} Invalid account or account/partition combination specified", HOUR),
        (f"{NO} Invalid qos specification", HOUR),
        (f"{NO} Invalid partition name specified", NONE),
        (f"{NO} Requested time limit is invalid (missing or exceeds some limit)", NONE),
        (f"{NO} Invalid job array specification", NONE),
        (f"{NO} Required partition not available (inactive or drain)", QUEUE),
        (f"{NO} Requested partition configuration not available now", QUEUE),
        (f"{NO} {CONFIGURATION}", QUEUE),
        (f"{NO} Requested reservation not usable now", QUEUE),
        (f"sbatch: error: Memory specification can not be satisfied\n{NO} {CONFIGURATION}", NONE),
        (f"sbatch: error: CPU count per node can not be satisfied\n{NO} {CONFIGURATION}", NONE),
        (f"{NO} {ACCOUNT_LIMIT}", QUEUE),
        (f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{NO} {ACCOUNT_LIMIT}", QUEUE),
        (f"sbatch: error: AssocGrpSubmitJobsLimit\n{NO} {ACCOUNT_LIMIT}", QUEUE),
        (f"sbatch: error: QOSMaxWallDurationPerJobLimit\n{NO} {ACCOUNT_LIMIT}", NONE),
        (f"{NO} Slurm temporarily unable to accept job, sleeping and retrying", QUEUE),
        (f"{NO} Slurm backup controller in standby mode", QUEUE),
        (f"{NO} Controller is in standby mode, try a different controller", QUEUE),
        (f"{NO} Resource temporarily unavailable", QUEUE),
        ("sbatch: error: Unable to open file /run/x/batch.sh: Permission denied", NONE),
        # A login node that cannot read the configuration or find the controller has sent nothing.
        ("sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Host name lookup failure\n"
         "sbatch: error: fetch_config: DNS SRV lookup failed\n"
         "sbatch: error: _establish_config_source: failed to fetch config\n"
         "sbatch: fatal: Could not establish a configuration source", QUEUE),
        ("sbatch: fatal: Unable to process configuration file", QUEUE),
        ("sbatch: fatal: Invalid user for SlurmUser slurm, ignored", QUEUE),
        # The messages of a site's job_submit.lua are no evidence of a broken connection.
        (f"sbatch: error: site policy: connect to the portal and accept the protocol\n{NO} Unspecified error", NONE),
        (f"sbatch: error: name a node type\n{NO} Unspecified error", NONE),
        (f"sbatch: error: your credential for the socket timed out\n{NO} Invalid partition name specified", NONE),
        (f"sbatch: error: too many jobs? try again\n{NO} Invalid partition name specified", NONE),
    ],
)  # fmt: skip
def test_refused(message: str, patience: Patience) -> None:
    with pytest.raises(SubmissionRefused) as caught:
        submitted(failed(message))
    assert caught.value.patience is patience
    assert "\n" not in str(caught.value)


def test_a_refusal_shows_the_whole_output(tmp_path: Path) -> None:
    said = "\n".join(
        [
            "sbatch: site rule 7: name a node type",
            "sbatch: error: see https://docs.example/C",
            f"{NO} Unspecified error",
        ]
    )
    with pytest.raises(SubmissionRefused) as caught:
        submitted(failed(said))
    assert str(caught.value) == (
        "Slurm refused: site rule 7: name a node type; see https://docs.example/C; Unspecified error"
    )
    with pytest.raises(SubmissionRefused) as caught:
        submitted(failed("\n".join([f"sbatch: error: {'word ' * 300}", f"{NO} Invalid partition name specified"])))
    assert str(caught.value).endswith("…; Invalid partition name specified") and len(str(caught.value)) < 450


def test_an_array_on_another_cluster_is_cancelled_there_and_refused(tmp_path: Path) -> None:
    config = "echo 'ClusterName = alpha'; echo 'SLURM_VERSION = 22.05.8'"
    answer = "echo 'Welcome; enjoy'; echo '17;beta'; echo 'Thank you'"
    bin_dir = programs(tmp_path, sbatch=answer, scontrol=config, scancel=f'echo "$@" >>{tmp_path}/cancelled')
    with pytest.raises(SubmissionRefused, match=r"cluster 'beta' as job 17.*observes 'alpha'; it was cancelled"):
        adapter(bin_dir).submit(submission(tmp_path))
    assert (tmp_path / "cancelled").read_text() == f"--clusters=beta --user={os.getuid()} --name=isthmus-x 17\n"
    (tmp_path / "own").mkdir()
    bin_dir = programs(tmp_path / "own", sbatch="echo '18;alpha'", scontrol=config)
    assert adapter(bin_dir).submit(submission(tmp_path / "own")) == 18


def test_an_sbatch_that_waits_for_room_is_distinguished_from_a_hanging_one(tmp_path: Path) -> None:
    words = "Slurm temporarily unable to accept job, sleeping and retrying"
    bin_dir = programs(tmp_path, sbatch=f"echo 'sbatch: error: {words}' >&2; sleep 60")
    with pytest.raises(SubmissionAmbiguous) as caught:
        adapter(bin_dir, timeout=2.0).submit(submission(tmp_path))
    assert caught.value.waiting and str(caught.value) == f"Slurm has no room for it: {words}"
    bin_dir = programs(tmp_path / "other", sbatch="sleep 60")
    with pytest.raises(SubmissionAmbiguous) as caught:
        adapter(bin_dir, timeout=1.0).submit(submission(tmp_path / "other"))
    assert not caught.value.waiting and str(caught.value) == "sbatch did not answer in time"


@pytest.mark.parametrize(
    "result",
    [
        failed(f"{NO} Socket timed out on send/recv operation"),
        failed(f"{NO} Unable to contact slurm controller (connect failure)"),
        failed(f"{NO} Zero Bytes were transmitted or received"),
        failed(f"{NO} Message send failure"),
        failed(f"{NO} Message receive failure"),
        failed(f"{NO} Communication shutdown failure"),
        failed(f"{NO} Unspecified error"),
        failed(f"sbatch: error: slurm_receive_msg: Unknown error 1\n{NO} Unspecified error"),
        failed("sbatch: error: Unable to contact slurm controller (connect failure)"),
        # The operating system's messages, not the controller's: they occur during the exchange.
        *(failed(f"{NO} {os.strerror(number)}\n") for number in (EPIPE, EHOSTUNREACH, ENETUNREACH, ECONNRESET, EIO)),
        failed("Killed", -9),
        failed("a wrapper's own words", 3),
        Result(0, "", ""),
        Result(0, "Your job 17 is on its way\n", ""),
        Result(0, "Submitted batch job 17\n18\n", ""),
        Result(0, "17\n18\n", ""),
    ],
)
def test_ambiguous(result: Result) -> None:
    with pytest.raises(SubmissionAmbiguous):
        submitted(result)


def programs(directory: Path, **scripts: str) -> Path:
    folder = directory / "bin"
    folder.mkdir(parents=True)
    for name, body in scripts.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return folder


def adapter(bin_dir: Path, **options: object) -> CliAdapter:
    environ = {
        "PATH": "/usr/bin:/bin",
        "SECRET": "of the bridge",
        "SBATCH_PARTITION": "gpu",
        "SLURM_CONF": "/etc/s.conf",
    }
    return CliAdapter(bin_dir=bin_dir, environ=environ, **options)  # type: ignore[arg-type]


def test_the_jobs_environment_is_not_the_bridges(tmp_path: Path) -> None:
    bin_dir = programs(tmp_path, sbatch=f"/usr/bin/env >{tmp_path}/env; echo 17")
    assert adapter(bin_dir).submit(submission(tmp_path)) == 17
    lines = (line.partition("=") for line in (tmp_path / "env").read_text().splitlines())
    names = {name for name, _, _ in lines} - {"PWD", "SHLVL", "_"}
    assert names == {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "SLURM_CONF"}


def test_an_sbatch_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    bin_dir = programs(tmp_path, sbatch=f"sleep 600 & echo $! >{tmp_path}/child; echo 17; wait")
    with pytest.raises(SubmissionAmbiguous, match="did not answer in time"):
        adapter(bin_dir, timeout=5).submit(submission(tmp_path))
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}")
    wait_until(lambda: not child.exists())
    assert not adapter(bin_dir).submission_may_run(tmp_path)


def submitting_bridge(directory: Path, sbatch: str, **options: object) -> tuple[subprocess.Popen[bytes], CliAdapter]:
    """Start a process that is inside sbatch, and return it with an adapter that observes it from outside."""
    started = directory / "started"
    bin_dir = programs(directory, sbatch=f"touch {started}; {sbatch}")
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from test_cli_adapter import adapter, submission;"
        f"adapter(Path(sys.argv[2]) / 'bin', **{options!r}).submit(submission(Path(sys.argv[2])))"
    )
    bridge = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(directory)])
    # The lock does not suffice as a sign: the bridge takes it before it starts sbatch.
    try:
        wait_until(started.exists)
    except BaseException:
        bridge.kill()
        raise
    return bridge, adapter(bin_dir)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_sbatch_that_outlives_the_bridge_is_noticed(tmp_path: Path) -> None:
    bridge, slurm = submitting_bridge(tmp_path, "sleep 60")
    try:
        assert slurm.submission_may_run(tmp_path)
        children = Path(f"/proc/{bridge.pid}/task/{bridge.pid}/children").read_text().split()
    finally:
        bridge.kill()
        bridge.wait()
    assert slurm.submission_may_run(tmp_path)
    with pytest.raises(SubmissionAmbiguous, match="still runs"):
        slurm.submit(submission(tmp_path))
    for child in children:
        os.killpg(int(child), 9)
    wait_until(lambda: not slurm.submission_may_run(tmp_path))


def test_an_orphaned_sbatch_is_ended(tmp_path: Path) -> None:
    bridge, slurm = submitting_bridge(tmp_path, "sleep 600 & wait", timeout=10)
    bridge.kill()
    bridge.wait()
    assert slurm.submission_may_run(tmp_path)
    wait_until(lambda: not slurm.submission_may_run(tmp_path))


def test_a_missing_program(tmp_path: Path) -> None:
    (tmp_path / "timeout").symlink_to("/usr/bin/timeout")
    nowhere = CliAdapter(environ={"PATH": str(tmp_path)})
    with pytest.raises(SlurmError, match="squeue: not found in PATH"):
        nowhere.jobs()
    with pytest.raises(SubmissionRefused) as caught:
        nowhere.submit(submission(tmp_path))
    assert caught.value.patience is Patience.QUEUE


def test_a_failing_query_is_an_error_with_slurms_message(tmp_path: Path) -> None:
    message = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    bin_dir = programs(tmp_path, squeue=f"echo '{message}' >&2; exit 1")
    with pytest.raises(SlurmError, match="squeue failed: slurm_load_jobs error: Unable to contact"):
        adapter(bin_dir).jobs()


CONFIG = (
    "AccountingStorageType = accounting_storage/{}\nJobCompType = jobcomp/{}\nMaxArraySize = 1001\nClusterName = c\n"
)


@pytest.mark.parametrize(
    ("storage", "completion", "sacct", "expected"),
    [
        ("slurmdbd", "none", "exit 0", "sacct"),
        ("none", "filetxt", "exit 0", "sacct -c"),
        ("none", "filetxt", "echo 'sacct: fatal: open: Permission denied' >&2; exit 1", ""),
        ("none", "none", "exit 0", ""),
    ],
)
def test_the_source_of_accounting(tmp_path: Path, storage: str, completion: str, sacct: str, expected: str) -> None:
    config = CONFIG.format(storage, completion) + "SLURM_VERSION = 22.05.8\n"
    bin_dir = programs(tmp_path, scontrol=f"printf '%s' '{config}'", sacct=sacct)
    description = adapter(bin_dir).describe()
    assert (description.accounting, description.version, description.cluster) == (expected, "22.05.8", "c")
    assert list(adapter(bin_dir).history(["isthmus-x"], 0.0)) == []


def test_commands_are_bounded() -> None:
    env = {"PATH": "/usr/bin:/bin"}
    assert run(["/bin/sh", "-c", "echo out; echo err >&2; exit 3"], env=env, timeout=60) == Result(3, "out\n", "err\n")
    with pytest.raises(CommandOutputTooLong):
        run(["/bin/sh", "-c", "yes"], env=env, timeout=60, max_output=1000)
    with pytest.raises(CommandTimeout):
        run(["/bin/sleep", "60"], env=env, timeout=0.2)
    assert len(run(["/bin/sh", "-c", "head -c 200000 /dev/zero >&2"], env=env, timeout=60).errors) == 65536
    with pytest.raises(OSError, match="No such file"):
        run(["/no/such"], env=env, timeout=60)
