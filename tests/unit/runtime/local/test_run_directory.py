"""Run directories are not overwritten, mixed up or shared by accident."""

import json
from pathlib import Path

import pytest

from isthmus.local.run_directory import RunDirectory, RunDirectoryError
from isthmus_contracts.manifests.manifest import FederatedJob, parse_spec


def make_job(name: str = "demo", rounds: int = 3) -> FederatedJob:
    pool = {"name": "cloud", "cloud": {}}
    spec = {"rounds": rounds, "task": {"image": "i", "command": ["true"]}, "pools": [pool]}
    return FederatedJob(name, "default", parse_spec(spec))


def open_briefly(root: Path, job: FederatedJob, *, resume: bool = False, overwrite: bool = False) -> str:
    with RunDirectory(root).opened(job, resume=resume, overwrite=overwrite) as uid:
        return uid


def commit(root: Path, number: int) -> None:
    (root / "checkpoints").mkdir(exist_ok=True)
    (root / "checkpoints" / f"round-{number:06d}.safetensors").touch()


def refusal(root: Path, job: FederatedJob, **options: bool) -> str:
    with pytest.raises(RunDirectoryError) as caught:
        open_briefly(root, job, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_job_file_is_what_the_aggregator_reads(tmp_path: Path) -> None:
    from isthmus.aggregator.job import load_job

    uid = open_briefly(tmp_path / "run", make_job())
    job = load_job(tmp_path / "run" / "job.json")
    assert (job.name, job.namespace, job.uid, job.spec) == ("demo", "default", uid, make_job().spec)


def test_an_earlier_run_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    open_briefly(tmp_path, make_job())
    commit(tmp_path, 2)
    message = refusal(tmp_path, make_job())
    assert "ended after round 2" in message
    assert all(option in message for option in ("--resume", "--overwrite", "--dir"))
    commit(tmp_path, 3)
    (tmp_path / "model.pt").touch()
    assert "a finished run" in refusal(tmp_path, make_job())


def test_resuming_keeps_the_uid_and_takes_the_new_manifest(tmp_path: Path) -> None:
    uid = open_briefly(tmp_path, make_job())
    assert open_briefly(tmp_path, make_job(rounds=9), resume=True) == uid
    assert json.loads((tmp_path / "job.json").read_text())["spec"]["rounds"] == 9


def test_overwriting_starts_again_and_keeps_foreign_files(tmp_path: Path) -> None:
    uid = open_briefly(tmp_path, make_job())
    commit(tmp_path, 2)
    (tmp_path / "notes.txt").write_text("mine")
    assert open_briefly(tmp_path, make_job("other"), overwrite=True) != uid
    assert RunDirectory(tmp_path).committed == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_with_other_things_is_never_taken(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "holds no run" in refusal(tmp_path, make_job(), overwrite=overwrite)


def test_resuming_nothing_is_refused_without_a_trace(tmp_path: Path) -> None:
    assert "no run to resume" in refusal(tmp_path / "typo", make_job(), resume=True)
    assert not (tmp_path / "typo").exists()


def test_resuming_another_jobs_run_is_refused(tmp_path: Path) -> None:
    open_briefly(tmp_path, make_job("one"))
    assert "a run of job one, not of two" in refusal(tmp_path, make_job("two"), resume=True)


def test_a_broken_job_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{")
    assert "not a job file" in refusal(tmp_path, make_job(), resume=True)


def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "file" in refusal(tmp_path / "file", make_job())


def test_two_runs_never_share_a_directory(tmp_path: Path) -> None:
    with RunDirectory(tmp_path).opened(make_job(), resume=False, overwrite=False):
        assert "in use by another run" in refusal(tmp_path, make_job(), resume=True)


def test_the_keys_go_with_the_run(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with directory.opened(make_job(), resume=False, overwrite=False):
        (directory.tls / "cloud").mkdir(parents=True)
        (directory.tls / "cloud" / "tls.key").touch()
    assert not directory.tls.exists()


def test_a_run_is_finished_when_its_last_round_has_a_model(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    open_briefly(tmp_path, make_job())
    commit(tmp_path, 3)
    assert not directory.finished(3)
    directory.model.touch()
    assert directory.finished(3)
    assert not directory.finished(4)


def test_a_run_is_its_users_own(tmp_path: Path) -> None:
    open_briefly(tmp_path / "run", make_job())
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
