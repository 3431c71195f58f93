"""Files that a job plants in its pool's directory affect at most its own pool."""

import os
import pwd
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isthmus_bridge.files.run_directory import RunDirectory
from isthmus_bridge.slurm import in_flight
from isthmus_bridge.users.directory import owner
from tests.support.fake_slurm import KEY, World


def ends(what: Callable[[], object]) -> bool:
    """Return True if the call ends."""
    thread = threading.Thread(target=what, daemon=True)
    thread.start()
    thread.join(60)
    return not thread.is_alive()


def running(world: World, **changes: object) -> Path:
    """Return the directory of a pool whose jobs run."""
    world.ensure(**changes)
    world.tick()
    world.array().states = ["RUNNING"] * len(world.array().states)
    world.tick()
    return world.policy.run_dir / KEY


def test_a_pipe_in_place_of_a_clients_exit_does_not_block(world: World) -> None:
    os.mkfifo(running(world, clients_per_job=3) / "tasks" / "0.exit")
    assert ends(world.tick)


def test_a_pipe_in_place_of_a_tasks_start_does_not_block(world: World) -> None:
    os.mkfifo(running(world) / "tasks" / "0.start")
    world.array().visible = world.slurm.keeps_accounts = False
    assert ends(world.tick)


def test_pipes_in_place_of_the_bridges_files_do_not_block(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, KEY)
    run.create({"tls.key": b"key"})
    run.write_code({"train.py": b"old"})
    for path in (run.tls / "tls.key", run.code / "train.py", run.script, run.client_script):
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    def again() -> None:
        run.write_credentials({"tls.key": b"newer"})
        run.write_code({"train.py": b"new"})
        run.write_scripts("batch", "client")

    assert ends(again)
    assert (run.tls / "tls.key").read_bytes() == b"newer" and (run.code / "train.py").read_bytes() == b"new"
    assert (run.script.read_text(), run.client_script.read_text()) == ("batch", "client")
    assert run.script.stat().st_mode & 0o777 == 0o700 and (run.tls / "tls.key").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in run.path.glob("**/.*")] == [".isthmus-pool"]


def test_a_pipe_in_place_of_a_requests_time_does_not_block_and_is_ignored(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "request.until")
    failures: list[OSError] = []

    def look() -> None:
        try:
            in_flight.may_run(tmp_path)
        except OSError as error:
            failures.append(error)

    assert ends(look) and "is not a regular file" in str(failures[0])
    (tmp_path / "request.until").unlink()
    (tmp_path / "request.until").write_bytes(b"\xff\n")
    assert in_flight.may_run(tmp_path), "unknown content does not prove that a submission is over"
    (tmp_path / "request.until").unlink()
    os.mkfifo(tmp_path / ".request.until.new")
    assert ends(lambda: in_flight.announce(tmp_path, 60.0)) and in_flight.may_run(tmp_path)


def test_a_pipe_in_place_of_the_owners_name_is_ignored(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "credentials-of")
    assert ends(lambda: owner(tmp_path)) and owner(tmp_path) == ""


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, KEY)
    run.create({})
    secret = tmp_path / "secret"
    secret.write_text("77 0 3\n")
    run.log(0).symlink_to(secret)
    (run.path / "tasks" / "0.exit").symlink_to(secret)
    assert (run.tails([0]), run.exits([0]), run.task_markers()) == ({0: ""}, {}, {})


@pytest.fixture
def own_folder() -> Iterator[Path]:
    """Yield a directory of an ordinary user, and continue as that user, because root may write anywhere."""
    folder = Path(tempfile.mkdtemp())
    before = os.geteuid()
    if before == 0:
        nobody = pwd.getpwnam("nobody").pw_uid
        os.chown(folder, nobody, -1)
        os.seteuid(nobody)
    try:
        yield folder
    finally:
        os.seteuid(before)
        subprocess.run(["chmod", "-R", "u+rwx", folder], check=True)
        shutil.rmtree(folder)


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_folders_that_a_job_made_read_only_are_removed_and_no_link_is_followed(own_folder: Path, mode: int) -> None:
    run = RunDirectory(own_folder / "run", KEY)
    run.create({"tls.key": b"key"})
    (elsewhere := own_folder / "elsewhere").mkdir()
    (elsewhere / "kept").touch()
    elsewhere.chmod(0o555)
    cache = run.path / "work" / "0" / "modcache"
    (cache / "deeper").mkdir(parents=True)
    (cache / "deeper" / "file").touch()
    (run.path / "work" / "link").symlink_to(elsewhere)
    for folder in (cache / "deeper", cache, cache.parent, run.tls, run.path):
        folder.chmod(mode)
    run.forget_credentials()
    assert not run.tls.exists()
    run.remove()
    assert not run.path.exists()
    assert elsewhere.stat().st_mode & 0o777 == 0o555 and (elsewhere / "kept").exists()
    run.remove()
    run.forget_credentials()


def test_a_link_in_place_of_the_credentials_folder_is_harmless(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, KEY)
    run.create({})
    (elsewhere := tmp_path / "elsewhere").mkdir()
    run.tls.rmdir()
    run.tls.symlink_to(elsewhere)
    run.forget_credentials()
    assert not run.tls.is_symlink() and elsewhere.exists()


@pytest.mark.parametrize("where", ["logs/0.log", "tasks/0.exit"])
def test_a_directory_in_a_files_place_costs_no_descriptor(world: World, where: str) -> None:
    (running(world) / where).mkdir()
    world.array().states[0] = "FAILED"
    world.tick()
    before = len(list(Path("/proc/self/fd").iterdir()))
    world.tick(times=20)
    # Fewer remain if descriptors of earlier tests are collected meanwhile.
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
