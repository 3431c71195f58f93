"""The worker that uses pyslurm, with a fake module of that name, and the parsing of its answers."""

import json
import sys
from pathlib import Path

import pytest

from isthmus_bridge.slurm import in_flight
from isthmus_bridge.slurm.command import Result
from isthmus_bridge.slurm.model import Gres, Patience, SlurmError, SubmissionAmbiguous, SubmissionRefused
from isthmus_bridge.slurm.pyslurm.adapter import PyslurmAdapter, description, records, submitted
from tests.integration.bridge.test_cli_adapter import submission

MODULE = """
import json, os, sys, types
HERE = os.path.dirname(__file__)
class RPCError(Exception):
    def __init__(self, errno, msg): self.errno, self.msg = errno, msg
def slurm_init(conf): assert os.environ["PYSLURM_DISABLE_AUTO_INIT"]
def job(**changes):
    values = dict(id=18, array_id=17, array_task_id=None, array_tasks_waiting=None, name="isthmus-x", state="RUNNING",
                  user_id=os.getuid(), state_reason="None", exit_code=None, exit_code_signal=None, requeue_count=1,
                  start_time=100, end_time=700, submit_time=90, allocated_nodes="n1",
                  working_directory="/run/x")
    return types.SimpleNamespace(**{**values, **changes})
class Jobs:
    @staticmethod
    def load():
        return {18: job(), 17: job(id=17, array_tasks_waiting="1-3", state="PENDING", state_reason="Resources"),
                9: job(id=9, name="other"), 8: job(id=8, user_id=-1)}
class Job:
    def __init__(self, number): self.number = number
    def cancel(self): open(HERE + "/cancelled", "a").write(f"{self.number}\\n")
class JobSubmitDescription:
    def __init__(self, **values): self.values = values
    def submit(self):
        mode = self.values["comment"]
        if mode == "die": os.kill(os.getpid(), 9)
        if mode == "refuse": raise RPCError(2000, "Invalid partition name specified")
        if mode == "lost": raise RPCError(5005, "Zero Bytes were transmitted or received")
        open(HERE + "/env", "w").write(json.dumps(dict(os.environ)))
        return 17
"""


_cancelled: list[tuple[str, int, int, int]] = []


def _scancel(name: str, array_id: int, first: int, last: int) -> None:
    _cancelled.append((name, array_id, first, last))


@pytest.fixture
def adapter(tmp_path: Path) -> PyslurmAdapter:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "pyslurm.py").write_text(MODULE)
    python = tmp_path / "python"
    # -I ignores PYTHONPATH, so the directory is added explicitly.
    code = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); sys.argv.pop(0); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    python.write_text(f'#!/bin/bash\nshift\nexec {sys.executable} -c "{code}" {modules} "$@"\n')
    python.chmod(0o755)
    return PyslurmAdapter(_scancel, python=python, environ={"PATH": "/usr/bin:/bin", "SECRET": "of the bridge"})


def test_the_queue_is_translated(adapter: PyslurmAdapter) -> None:
    one, rest, other = adapter.jobs()
    assert (one.job_id, one.array_id, one.indices, one.state, one.ends, one.restarts) == (
        18,
        17,
        (0,),
        "RUNNING",
        700.0,
        1,
    )
    assert (one.name, one.directory, other.name) == ("isthmus-x", "/run/x", "other")
    assert (rest.indices, rest.state, rest.reason, rest.ends) == ((1, 2, 3), "PENDING", "Resources", 0.0)


def test_submissions(adapter: PyslurmAdapter, tmp_path: Path) -> None:
    assert adapter.submit(submission(tmp_path)) == 17
    assert "SECRET" not in json.loads((tmp_path / "modules" / "env").read_text())
    with pytest.raises(SubmissionRefused, match="Slurm refused: Invalid partition") as caught:
        adapter.submit(submission(tmp_path, comment="refuse"))
    assert caught.value.patience is Patience.NONE
    for mode in ("die", "lost"):
        with pytest.raises(SubmissionAmbiguous):
            adapter.submit(submission(tmp_path, comment=mode))
    assert not in_flight.may_run(tmp_path)


def test_only_a_job_of_that_name_is_cancelled(adapter: PyslurmAdapter, tmp_path: Path) -> None:
    adapter.cancel("isthmus-y", 17)
    assert not (tmp_path / "modules" / "cancelled").exists()
    adapter.cancel("isthmus-x", 17)
    assert (tmp_path / "modules" / "cancelled").read_text() == "17\n"
    assert not _cancelled
    adapter.cancel("isthmus-x", 17, 2, 4)
    assert _cancelled == [("isthmus-x", 17, 2, 4)]


def test_without_pyslurm_nothing_is_submitted(tmp_path: Path) -> None:
    adapter = PyslurmAdapter(_scancel, environ={"PATH": "/usr/bin:/bin"})
    with pytest.raises(SlurmError, match="cannot import pyslurm"):
        adapter.jobs()
    with pytest.raises(SubmissionRefused, match="cannot import pyslurm") as caught:
        adapter.submit(submission(tmp_path))
    assert caught.value.patience is Patience.QUEUE


def test_the_submission_that_pyslurm_receives() -> None:
    job = description(submission(Path("/r"), gres=(Gres("gpu", "", 2),), at_once=3), {"PATH": "/bin"})
    assert (job["array"], job["memory_per_node"], job["time_limit"], job["gres_per_node"]) == (
        "0-7%3",
        "512M",
        61,
        "gpu:2",
    )
    assert job["signal"] == {"signal": 15, "time": 60, "batch_only": True}
    assert job["environment"] == {"PATH": "/bin"}


@pytest.mark.parametrize("output", ["", "[]", "{}", '{"result": 0}', '{"error": ["2000", "x"]}', "{"])
def test_an_invalid_answer_is_ambiguous(output: str) -> None:
    with pytest.raises(SubmissionAmbiguous):
        submitted(Result(0, output, ""))


REPORTED = {
    "id": 18, "array": 17, "task": None, "waiting": None, "name": "isthmus-x", "state": "RUNNING", "reason": "None",
    "exit_code": 0, "signal": 0, "restarts": 0, "start": 100, "end": 700, "submitted": 90, "node": "n1",
    "directory": "/r",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "indices"),
    [
        ({}, (0,)),
        ({"task": 3}, (3,)),
        ({"state": "COMPLETED"}, (0,)),
        ({"state": "PENDING", "node": "", "restarts": 1}, (0,)),
        ({"state": "CANCELLED", "node": "", "restarts": 1}, (0,)),
        ({"id": 17, "state": "CANCELLED", "node": "", "waiting": "4"}, (4,)),
        # The tasks were cancelled before they started, and the record stands for several: Slurm does not say which.
        # Task 0 may run.
        ({"id": 17, "state": "CANCELLED", "node": "", "start": 0}, None),
    ],
)
def test_which_tasks_a_record_means(changes: dict[str, object], indices: tuple[int, ...] | None) -> None:
    (record,) = records([{**REPORTED, **changes}])
    assert record.indices == indices
