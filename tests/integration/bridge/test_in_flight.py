"""Marker of a submission that may be in flight, on file systems with and without locks."""

import errno
import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from isthmus_bridge.slurm import in_flight
from isthmus_bridge.slurm.model import Patience, SubmissionAmbiguous, SubmissionRefused


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_lock_lives_as_long_as_the_program_that_inherited_it(tmp_path: Path) -> None:
    with in_flight.guarded(tmp_path, 1000) as locks:
        program = subprocess.Popen(["sleep", "60"], pass_fds=locks)
    try:
        assert in_flight.may_run(tmp_path)
        with pytest.raises(SubmissionAmbiguous), in_flight.guarded(tmp_path, 1000):
            pass
    finally:
        program.kill()
        program.wait()
    assert not in_flight.may_run(tmp_path)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_time_is_recorded(tmp_path: Path) -> None:
    with in_flight.guarded(tmp_path, 1000) as locks:
        assert list(locks) == [] and in_flight.may_run(tmp_path)
    assert not in_flight.may_run(tmp_path)
    with pytest.raises(SubmissionRefused), in_flight.guarded(tmp_path, 1000):
        raise SubmissionRefused("never started")
    assert not in_flight.may_run(tmp_path)
    with pytest.raises(SubmissionAmbiguous), in_flight.guarded(tmp_path, 1000):
        raise SubmissionAmbiguous("did not answer in time")
    assert in_flight.may_run(tmp_path)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EDQUOT, errno.ENOSPC])
def test_a_failure_to_start_is_a_temporary_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SubmissionRefused, match=os.strerror(number)) as caught, in_flight.guarded(tmp_path, 1000):
        pytest.fail("it began")
    assert caught.value.patience is Patience.QUEUE
