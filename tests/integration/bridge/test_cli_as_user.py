"""The CLI adapter and jobs of other local users, without sudo and without Slurm."""

import time
from pathlib import Path

import pytest

from isthmus_bridge.slurm.command import CommandTimeout, Result, run
from isthmus_bridge.slurm.model import Patience, SlurmError, Submission, SubmissionAmbiguous, SubmissionRefused
from isthmus_bridge.slurm.run_as import AsUserError
from isthmus_bridge.slurm.unix_users import uid_of

from .test_cli_adapter import adapter, programs, submission

CONFIG = "AccountingStorageType = accounting_storage/none\\nSLURM_VERSION = 22.05.8\\nPrivateData = {}\\n"
DAEMON = uid_of("daemon")


class Delegate:
    """A delegate that gives a preset answer."""

    def __init__(self, answer: Result | AsUserError) -> None:
        self.answer = answer
        self.asked: list[tuple[object, ...]] = []

    def submit(self, submission: Submission, deadline: float) -> Result:
        assert time.time() < deadline < time.time() + 60
        return self._answer("submit", submission.user)

    def cancel(self, user: str, name: str, array_id: int, first: int, last: int | None) -> Result:
        return self._answer("cancel", user, name, array_id, first, last)

    def _answer(self, *what: object) -> Result:
        self.asked.append(what)
        if isinstance(self.answer, AsUserError):
            raise self.answer
        return self.answer


def test_a_submission_goes_to_the_delegate_and_is_recorded_while_it_is_in_flight(tmp_path: Path) -> None:
    wanted = submission(Path("/of/the/user"), user="daemon", guard=tmp_path)
    delegate = Delegate(Result(0, "17\n", ""))
    one = adapter(tmp_path, delegate=delegate)
    assert one.submit(wanted) == 17
    assert delegate.asked == [("submit", "daemon")]
    assert not one.submission_may_run(tmp_path)
    # Nothing was started, so the submission may be repeated at once.
    delegate.answer = AsUserError("sudo: a password is required")
    with pytest.raises(SubmissionRefused) as caught:
        one.submit(wanted)
    assert caught.value.patience is Patience.QUEUE and not one.submission_may_run(tmp_path)
    # sbatch may have run: neither this bridge nor the next submits again before it has ended.
    delegate.answer = AsUserError("no answer in time", begun=True)
    with pytest.raises(SubmissionAmbiguous, match="no answer in time"):
        one.submit(wanted)
    later = adapter(tmp_path, delegate=delegate)
    assert later.submission_may_run(tmp_path)
    with pytest.raises(SubmissionAmbiguous, match="still runs"):
        later.submit(wanted)
    assert len(delegate.asked) == 3
    (other := tmp_path / "other").mkdir()
    with pytest.raises(SubmissionRefused, match="no settings `users`"):
        adapter(tmp_path).submit(submission(Path("/of/the/user"), user="daemon", guard=other))


def test_cancelling_goes_to_the_delegate(tmp_path: Path) -> None:
    delegate = Delegate(Result(1, "", "scancel: error: Invalid job id"))
    adapter(tmp_path, delegate=delegate).cancel("isthmus-x", 5, 1, 2, "daemon")
    assert delegate.asked == [("cancel", "daemon", "isthmus-x", 5, 1, 2)]
    for answer in (Result(-9, "", ""), AsUserError("sudo: a password is required")):
        delegate.answer = answer
        with pytest.raises(SlurmError):
            adapter(tmp_path, delegate=delegate).cancel("isthmus-x", 5, user="daemon")


def row(job: int, uid: object) -> str:
    fields = [
        str(job),
        str(job),
        "0-1",
        "isthmus-x",
        "PENDING",
        "0",
        "0",
        "N/A",
        "N/A",
        "1",
        "",
        str(uid),
        "None",
        "/run/x",
    ]
    return "SEP".join(fields) + "SEP"


def test_the_queue_of_several_users_is_one_call(tmp_path: Path) -> None:
    (tmp_path / "queue").write_text("\n".join([row(1, 0), row(2, DAEMON), row(3, 54321)]) + "\n")
    bin_dir = programs(
        tmp_path,
        squeue=f'echo "$@" >{tmp_path}/asked; f=${{SQUEUE_FORMAT2#*:}}; sed "s/SEP/${{f%%,*}}/g" {tmp_path}/queue',
        scontrol=f"printf '{CONFIG.format('none')}'",
    )  # fmt: skip
    one = adapter(bin_dir)
    one._uid = 0
    found = {record.array_id: record.user for record in one.jobs(["daemon"])}
    assert found == {1: "", 2: "daemon"}, "what others own is not told, whatever its name"
    assert f"--user=0,{DAEMON}\n" in (tmp_path / "asked").read_text()
    assert {record.array_id for record in one.jobs()} == {1}
    with pytest.raises(SlurmError, match="the local user no-such-user is not known"):
        one.jobs(["no-such-user"])


def test_a_queue_that_hides_jobs_is_no_evidence_that_there_are_none(tmp_path: Path) -> None:
    hidden = CONFIG.format("accounts,jobs")
    bin_dir = programs(tmp_path, squeue="true", scontrol=f"printf '{hidden}'")
    assert list(adapter(bin_dir).jobs()) == []
    with pytest.raises(SlurmError, match="PrivateData hides other users' jobs; make the bridge's user an operator"):
        adapter(bin_dir).jobs(["daemon"])
    assert list(adapter(bin_dir, operator=True).jobs(["daemon"])) == []
    # A look-up of a lost job checks again whether the job is visible.
    one = adapter(bin_dir)
    (bin_dir / "scontrol").write_text(f"#!/bin/sh\nprintf '{CONFIG.format('none')}'\n")
    assert list(one.jobs(["daemon"])) == []
    (bin_dir / "scontrol").write_text(f"#!/bin/sh\nprintf '{hidden}'\n")
    with pytest.raises(SlurmError, match="PrivateData"):
        one.history(["isthmus-x"], 0.0, "daemon")


def test_a_program_gets_its_input_and_may_leave_it(tmp_path: Path) -> None:
    env = {"PATH": "/usr/bin:/bin"}
    content = b"x" * 3_000_000
    assert run(["/bin/sh", "-c", "wc -c"], env=env, timeout=60, content=content).output.strip() == "3000000"
    assert run(["/bin/cat"], env=env, timeout=60, content=content, max_output=1 << 23).output == content.decode()
    assert run(["/bin/sh", "-c", "exec <&-; echo done"], env=env, timeout=60, content=content).output == "done\n"
    with pytest.raises(CommandTimeout):
        run(["/bin/sleep", "60"], env=env, timeout=0.5, content=content)
