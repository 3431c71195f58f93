"""Contract tests of all Slurm adapters.

The pyslurm adapter is tested where ISTHMUS_PYSLURM names a Python that has pyslurm for the cluster's version of Slurm:
`python -m lab newer-slurm` creates one, beside a Slurm newer than the lab's, for all three adapters.
"""

import base64
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from isthmus_bridge import slurm_adapters
from isthmus_bridge.policy.policy import SlurmSettings
from isthmus_bridge.slurm.model import (
    Gres,
    Patience,
    SlurmAdapter,
    SlurmError,
    Submission,
    SubmissionAmbiguous,
    SubmissionRefused,
    TaskRecord,
)
from isthmus_bridge.slurm.options import Options
from isthmus_contracts.identities import slurm_job_name
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.slurm_states import meaning

from .slurm_site import Site, ensure, get, over, running, slurm, spec, until

if TYPE_CHECKING:
    from lab import Lab

REST_HINT = "no slurmrestd: set ISTHMUS_SLURMRESTD to its address (unix:/PATH or https://HOST:PORT); the lab does"
PYSLURM_HINT = (
    "no pyslurm: set ISTHMUS_PYSLURM to a Python that has pyslurm for this version of Slurm, or run them by"
    " `python -m lab newer-slurm -- /opt/isthmus/bin/python -m pytest tests/slurm/test_adapters.py`"
)
HOSTILE = 'it\'s "$(touch pwned)" `touch pwned`; touch pwned & -- --help %j \\ {0} ü'

Make = Callable[..., SlurmAdapter]


def settings(name: str, **changes: Any) -> SlurmSettings:
    """Return the Slurm settings of a policy."""
    rest = {"url": os.environ.get("ISTHMUS_SLURMRESTD", "unix:/none"), "token_command": ["scontrol", "token"]}
    content = {
        "adapter": name, "command_timeout_seconds": 60, "rest": rest,
        "pyslurm": {"python": os.environ.get("ISTHMUS_PYSLURM", sys.executable)},
    }  # fmt: skip
    return SlurmSettings.model_validate({**content, **changes})


@pytest.fixture(params=["cli", "rest", "pyslurm"])
def make(request: pytest.FixtureRequest, _cluster: None, require: Callable[[bool, str], None]) -> Make:
    """Return a new adapter, as after a restart of the bridge."""
    name: str = request.param
    if name == "rest":
        require("ISTHMUS_SLURMRESTD" in os.environ, REST_HINT)
    if name == "pyslurm":
        require("ISTHMUS_PYSLURM" in os.environ, PYSLURM_HINT)

    def made(**changes: Any) -> SlurmAdapter:
        chosen = settings(name, **changes)
        if name == "rest":
            assert chosen.rest is not None
            return slurm_adapters.rest(chosen, chosen.rest)
        return slurm_adapters.cli(chosen) if name == "cli" else slurm_adapters.pyslurm(chosen)

    return made


@pytest.fixture
def wanted(folder: Path) -> Iterator[Callable[..., Submission]]:
    """Yield a function that builds submissions; their jobs are cancelled at the end."""
    names: list[str] = []

    def build(script: str, **changes: Any) -> Submission:
        names.append(slurm_job_name(os.urandom(16).hex()))
        directory = changes.pop("directory", folder)
        path = directory / f"{names[-1]}.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        fields: dict[str, Any] = {
            "name": names[-1], "script": path, "directory": directory, "output": f"{directory}/%a.log", "tasks": 3,
            "comment": "isthmus default/fashion/lumi", "partition": "main", "account": "", "qos": "",
            "time_limit_seconds": 600, "warning_seconds": 60, "cpus_per_task": 1, "memory_mib": 50,
        }  # fmt: skip
        return Submission(**{**fields, **changes})

    yield build
    for name in names:
        slurm("scancel", f"--name={name}", check=False)
    until(lambda: not [n for n in slurm("squeue", "-h", "-o", "%j").split() if n in names], "the jobs are gone")


def tasks(adapter: SlurmAdapter, name: str, count: int = 3) -> dict[int, TaskRecord]:
    """Return the queue's records of the tasks with this name. A record without indices stands for all others."""
    found = [record for record in adapter.jobs() if record.name == name]
    others = {index: record for record in found if record.indices is None for index in range(count)}
    return others | {index: record for record in found for index in record.indices or ()}


def all_over(
    adapter: SlurmAdapter, name: str, count: int, ask: Callable[[], None] = lambda: None
) -> dict[int, TaskRecord]:
    """Return the queue's records once all tasks have ended."""

    def ended() -> dict[int, TaskRecord] | None:
        ask()
        now = tasks(adapter, name, count)
        return now if len(now) == count and all(meaning(each.state).over for each in now.values()) else None

    found = until(ended, "all tasks are over", 90)
    assert isinstance(found, dict)
    return found


def test_an_array_runs_and_ends(
    make: Make, wanted: Callable[..., Submission], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_SECRET", "of the bridge")
    adapter = make()
    # The queue keeps a task that ends before the last one has started.
    one = wanted('env; cat; pwd; [ "$SLURM_ARRAY_TASK_ID" != 1 ] || exit 3', at_once=2)
    array = adapter.submit(one)
    assert not adapter.submission_may_run(folder)
    ended = all_over(adapter, one.name, 3)
    assert {index: (each.state, each.exit_code, each.signal) for index, each in ended.items()} == {
        0: ("COMPLETED", 0, 0), 1: ("FAILED", 3, 0), 2: ("COMPLETED", 0, 0),
    }  # fmt: skip
    assert {each.array_id for each in ended.values()} == {array}
    assert len({each.job_id for each in ended.values()}) == 3
    assert all(each.node and each.submitted and each.start >= each.submitted for each in ended.values())
    # A new adapter, as after a restart of the bridge, finds them by their name.
    assert {record.array_id for record in make().jobs() if record.name == one.name} == {array}
    said = (folder / "0.log").read_text().splitlines()
    assert said[-1] == str(folder)
    foreign = {line.partition("=")[0] for line in said if "=" in line} & set(os.environ)
    assert foreign <= {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "PWD", "SHLVL", "_", "SLURM_CONF", "TMPDIR"}
    if adapter.describe().accounting:
        kept = until(lambda: adapter.history([one.name], time.time()), "the accounts know it")
        until(lambda: len(adapter.history([one.name], time.time())) == 3, "the accounts know all of it")
        assert {record.name for record in kept} == {one.name}
        assert adapter.history(["isthmus-none"], time.time()) == []
    else:
        assert adapter.history([one.name], time.time()) == []


def test_the_queue_shows_the_reason_and_the_expected_start(make: Make, wanted: Callable[..., Submission]) -> None:
    adapter = make()
    # More than the lab's two nodes with four CPUs each can run.
    one = wanted("sleep 300", cpus_per_task=4)
    array = adapter.submit(one)

    def reported() -> TaskRecord | None:
        now = tasks(adapter, one.name)
        waits = [each for each in now.values() if each.state == "PENDING"]
        runs = [each for each in now.values() if each.state == "RUNNING"]
        return waits[0] if len(runs) == 2 and len(waits) == 1 and waits[0].reason and waits[0].start else None

    waiting = until(reported, "two run, and the third has a reason and an expected start", 90)
    assert waiting.reason in ("Resources", "Priority")
    running_ones = [each for each in tasks(adapter, one.name).values() if each.state == "RUNNING"]
    assert all(500 < each.ends - each.start <= 660 for each in running_ones)
    adapter.cancel("isthmus-of-somebody-else", array)
    assert sum(each.state == "RUNNING" for each in tasks(adapter, one.name).values()) == 2
    # In Slurm 26.05, scancel ends the tasks one by one and misses one that starts meanwhile, so the bridge repeats it.
    ended = all_over(adapter, one.name, 3, lambda: adapter.cancel(one.name, array))
    assert {each.state for each in ended.values()} == {"CANCELLED"}
    # A repeated cancel, as after a crash, succeeds.
    adapter.cancel(one.name, array)
    adapter.cancel(one.name, 99_999_999)


# sbatch's own warning is tested with pools, because Slurm checks the limits only every half minute.
@pytest.mark.parametrize("make", ["rest", "pyslurm"], indirect=True)
def test_a_task_is_warned_before_its_limit(make: Make, wanted: Callable[..., Submission], folder: Path) -> None:
    """Slurm's limits count in minutes, and its warning may come a minute early, which is at once for this task."""
    adapter = make()
    one = wanted("trap 'echo warned; exit 0' TERM; sleep 300 & wait", tasks=1, time_limit_seconds=60,
                 warning_seconds=55)  # fmt: skip
    adapter.submit(one)
    ended = all_over(adapter, one.name, 1)
    assert ended[0].state == "COMPLETED"
    # slurmd may add lines.
    assert "warned" in (folder / "0.log").read_text().splitlines()


def test_nothing_in_a_submission_is_code(make: Make, wanted: Callable[..., Submission], folder: Path) -> None:
    adapter = make()
    odd = folder / 'it\'s "$(touch pwned)" `touch pwned`; ü'
    odd.mkdir()
    one = wanted("squeue -h -j $SLURM_JOB_ID -o %k; pwd", directory=odd, comment=HOSTILE, tasks=1)
    adapter.submit(one)
    assert all_over(adapter, one.name, 1)[0].state == "COMPLETED"
    # Slurm prints the comment; older versions add a trailing blank.
    first, where = (odd / "0.log").read_text().splitlines()
    assert (first.rstrip(), where) == (HOSTILE, str(odd))
    assert not list(folder.rglob("pwned")) and not Path("pwned").exists()


# Expected output of `scontrol show job` for each option, in the versions that the tests support.
SHOWN = {
    "Features": r"Features=of-n2 ",
    "Licenses": r"Licenses=scratch:2",
    "Nice": r"Nice=7 ",
    "exclusive": r"OverSubscribe=NO",
    "memory per CPU": r"MinMemoryCPU=50M",
    "no partition": r"Partition=main ",
    "GPUs per task": r"TresPerTask=\S*gpu[:=]1\b",
    "account": r"Account=abc@v100 ",
}


def test_the_sites_own_options_reach_slurm(make: Make, wanted: Callable[..., Submission]) -> None:
    adapter = make()
    own = Options(
        constraint="of-n2", licenses="scratch:2", wckey="federated", nice=7, exclusive="yes", memory="per-cpu",
        gpus="per-task", threads_per_core=1,
    )  # fmt: skip
    one = wanted("sleep 300", tasks=1, partition="", account="abc@v100", gres=(Gres("gpu", "", 1),), options=own)
    array = adapter.submit(one)
    until(lambda: {each.state for each in tasks(adapter, one.name, 1).values()} == {"RUNNING"}, "it runs", 90)
    text = slurm("scontrol", "show", "job", str(array))
    assert {name for name, pattern in SHOWN.items() if not re.search(pattern, text)} == set(), text
    # Without a memory request, the site's default applies.
    bare = wanted("sleep 300", tasks=1, partition="", options=Options(memory="none"))
    text = slurm("scontrol", "show", "job", str(adapter.submit(bare)))
    assert re.search("MinMemoryCPU=100M|MinMemoryNode=0", text), text


@pytest.mark.parametrize("partition", ["nowhere", "--help", "$(touch pwned)", "main\nexit"])
def test_a_refusal_is_not_ambiguous(make: Make, wanted: Callable[..., Submission], partition: str) -> None:
    adapter = make()
    one = wanted("true", partition=partition)
    with pytest.raises(SubmissionRefused) as caught:
        adapter.submit(one)
    assert "\n" not in str(caught.value) and caught.value.patience is Patience.NONE
    assert not adapter.submission_may_run(one.directory)
    assert tasks(adapter, one.name) == {}


def test_the_cluster_is_described(make: Make) -> None:
    adapter = make()
    described = adapter.describe()
    assert described.version.split(".")[0].isdecimal()
    assert {"main", "debug"} <= set(adapter.partitions())


def test_a_controller_that_is_down_says_nothing(make: Make, wanted: Callable[..., Submission], lab: "Lab") -> None:
    """A controller that is down is an error, not an empty queue; earlier jobs reappear afterwards."""
    adapter, hasty = make(), make(command_timeout_seconds=2)
    one, another = wanted("sleep 300", tasks=1), wanted("sleep 300", tasks=1)
    array = adapter.submit(one)
    assert adapter.jobs()
    lab.stop_slurm_daemon("slurmctld")
    try:
        for ask in (hasty.jobs, hasty.partitions, lambda: hasty.cancel(one.name, array)):
            with pytest.raises(SlurmError):
                ask()
        with pytest.raises((SubmissionAmbiguous, SubmissionRefused)) as caught:
            hasty.submit(another)
        assert isinstance(caught.value, SubmissionAmbiguous) or caught.value.patience is Patience.QUEUE
    finally:
        lab.start_slurm_daemon("slurmctld")

    def back() -> bool:
        with suppress(SlurmError):
            return {each.array_id for each in adapter.jobs() if each.name == one.name} == {array}
        return False

    until(back, "the array is known again")


@pytest.fixture
def rest(_cluster: None, require: Callable[[bool, str], None]) -> dict[str, Any]:
    """Return the settings of slurmrestd, without a source of tokens."""
    require("ISTHMUS_SLURMRESTD" in os.environ, REST_HINT)
    return {"url": os.environ["ISTHMUS_SLURMRESTD"]}


def test_a_token_is_renewed_before_it_ends(rest: dict[str, Any], folder: Path) -> None:
    made = folder / "made"
    command = f"echo >>{made}; exec scontrol token lifespan=4"
    chosen = settings("rest", rest={**rest, "token_command": ["bash", "-c", command]})
    assert chosen.rest is not None
    adapter = slurm_adapters.rest(chosen, chosen.rest)
    began = time.monotonic()
    # Requests succeed for longer than two token lifetimes.
    until(lambda: adapter.jobs() is not None and time.monotonic() > began + 7, "the tokens end", 60)
    assert 2 <= made.read_text().count("\n") <= 8


def test_a_token_that_is_not_accepted_is_an_error(rest: dict[str, Any], folder: Path) -> None:
    file = folder / "token"
    chosen = settings("rest", rest={**rest, "token_file": str(file)})
    assert chosen.rest is not None
    adapter = slurm_adapters.rest(chosen, chosen.rest)
    with pytest.raises(SlurmError, match="cannot read"):
        adapter.jobs()
    file.write_text("not a token\n")
    with pytest.raises(SlurmError, match="holds no token"):
        adapter.jobs()
    claims = base64.urlsafe_b64encode(json.dumps({"exp": time.time() + 600, "sun": "root"}).encode()).decode()
    file.write_text(f"eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.{claims.rstrip('=')}.AAAA\n")
    with pytest.raises(SlurmError, match="slurmrestd: "):
        adapter.jobs()
    file.write_text(slurm("scontrol", "token"))
    assert adapter.jobs() is not None


def test_a_frozen_slurmrestd_submits_once(rest: dict[str, Any], site: Site, lab: "Lab") -> None:
    """slurmrestd receives the request and does not answer; the bridge dies; then slurmrestd executes the request."""
    pid = next(pid for name, pid, _ in lab.daemons() if name == "slurmrestd")
    assert pid is not None
    site.settings["slurm"] |= {
        "adapter": "rest", "command_timeout_seconds": 10, "rest": {**rest, "token_command": ["scontrol", "token"]},
    }  # fmt: skip
    operator = site.start()
    code, text = site.command("doctor")
    assert code == 0 and "REST adapter (in use): works; Slurm" in text, text
    first = site.key()
    ensure(operator, first, spec())
    running(operator, first)
    os.kill(pid, signal.SIGSTOP)
    key, wanted = site.key(), spec()
    try:
        threading.Thread(target=_try, args=(operator, key, wanted), daemon=True).start()
        until((site.folder / "run" / key / "request.until").exists, "the request is under way")
        until(lambda: "no answer in time" in get(operator, key).message, "the bridge gave up waiting")
        site.kill()
    finally:
        os.kill(pid, signal.SIGCONT)
    operator = site.start()
    ensure(operator, key, wanted)
    running(operator, key)
    assert site.arrays(key) == {get(operator, key).slurm_job_id}
    operator.CancelPool(pb.CancelPoolRequest(key=key), timeout=60)
    assert pb.Pool.Phase.Name(over(operator, key).phase) == "CANCELLED"
    assert site.arrays(key) == set() != site.arrays(first)


def _try(stub: Any, key: str, wanted: pb.PoolSpec) -> None:
    with suppress(grpc.RpcError):
        ensure(stub, key, wanted)


@pytest.mark.parametrize("make", ["pyslurm"], indirect=True)
def test_whole_pools_through_pyslurm(make: Make, site: Site) -> None:
    site.settings["slurm"] |= {"adapter": "pyslurm", "pyslurm": {"python": os.environ["ISTHMUS_PYSLURM"]}}
    operator = site.start()
    code, text = site.command("doctor")
    assert code == 0 and "pyslurm adapter (in use): works; Slurm" in text, text
    key, long = site.key(), site.key()
    ensure(operator, long, spec())
    ensure(operator, key, spec(command=["sh", "-c", 'exit "$ISTHMUS_INDEX"']))
    pool = over(operator, key)
    assert (pb.Pool.Phase.Name(pool.phase), pool.succeeded, pool.failed) == ("FAILED", 1, 1)
    running(operator, long)
    site.kill()
    operator = site.start()
    operator.CancelPool(pb.CancelPoolRequest(key=long), timeout=60)
    assert pb.Pool.Phase.Name(over(operator, long).phase) == "CANCELLED"
    assert site.arrays(long) == set()


def test_some_tasks_of_an_array_end_and_the_others_run_on(make: Make, wanted: Callable[..., Submission]) -> None:
    adapter = make()
    one = wanted("sleep 300", tasks=5, cpus_per_task=2)
    array = adapter.submit(one)

    def states() -> dict[int, str]:
        return {index: each.state for index, each in tasks(adapter, one.name, 5).items()}

    until(lambda: sorted(states().values()) == ["PENDING", *["RUNNING"] * 4], "four run, and the fifth waits", 90)
    adapter.cancel("isthmus-of-somebody-else", array, 1, 4)
    running = {index for index, state in states().items() if state == "RUNNING"}
    assert len(running) == 4
    # The running tasks and the pending one.
    until(
        lambda: adapter.cancel(one.name, array, 2, 4) or {i for i, s in states().items() if s == "RUNNING"} == {0, 1},
        "the last three are over",
        90,
    )
    assert not {index for index, state in states().items() if state == "PENDING"}


def test_tasks_within_a_task(make: Make, wanted: Callable[..., Submission], folder: Path) -> None:
    adapter = make()
    adapter.submit(wanted("srun --kill-on-bad-exit=0 sh -c 'echo step $SLURM_PROCID'", tasks=1, steps=2))
    log = folder / "0.log"

    def said() -> set[str]:
        return set(log.read_text().split("\n")) if log.exists() else set()

    until(lambda: {"step 0", "step 1"} <= said(), "both have run", 90)
