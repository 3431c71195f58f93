"""Commands that cannot run here are reported before any process starts."""

import sys
from pathlib import Path

import pytest

from isthmus.local.preflight import CommandError, check_command, script_of


@pytest.mark.parametrize(
    ("command", "script"),
    [
        ("python train.py", "train.py"),
        ("python3.12 -u -W ignore -X dev src/train.py --data x.py", "src/train.py"),
        ("/opt/venv/bin/python -O train", "train"),
        ("python -m package.train train.py", None),
        ("python -um package.train", None),
        ("python -c pass", None),
        ("python -", None),
        ("torchrun --standalone --nproc-per-node 2 train.py --lr 1", "train.py"),
        ("torchrun --nproc-per-node=2 -m package.train other.py", None),
        ("torchrun --nproc-per-node 2 --no-python ./start train.py", None),
        ("accelerate launch train.py", "train.py"),
        ("torchrun train", None),
        ("sh -c train.py", None),
        ("./start.sh train.py", None),
        ("pythonic train.py", None),
    ],
)
def test_which_script_a_command_runs(command: str, script: str | None) -> None:
    assert script_of(command.split()) == script


def problem(command: str, directory: Path, beside: Path | None = None, files: list[str] | None = None) -> str:
    with pytest.raises(CommandError) as caught:
        check_command(command.split(), "/usr/bin:/bin", directory, beside or directory, files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert problem("no-such-program x", tmp_path).startswith("task.command: no-such-program: no such program in PATH; ")
    assert (
        problem("./start.sh", tmp_path)
        == f"task.command: ./start.sh: no such file in {tmp_path}, where the command runs"
    )
    assert problem("/no/such/python train.py", tmp_path) == "task.command: /no/such/python: no such file"


def test_a_script_that_is_not_there_is_named_with_where_it_is(tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    command = f"{sys.executable} train.py"
    missing = f"task.command: train.py: no such file in {tmp_path}, where the command runs"
    assert problem(command, tmp_path, beside) == missing
    (beside / "train.py").touch()
    assert problem(command, tmp_path, beside) == f"{missing}; it is beside the manifest: start isthmus run in {beside}"


def test_files_that_a_job_brings_count(tmp_path: Path) -> None:
    nowhere = tmp_path / "code"  # written later
    check_command([sys.executable, "./train.py"], "", nowhere, tmp_path, ["train.py"])
    assert problem(f"{sys.executable} train.py", nowhere, files=["b.py", "a.py"]) == (
        "task.command: train.py: not among the files of task.code (a.py, b.py)"
    )


@pytest.mark.parametrize("package", ["isthmus", "torch"])
def test_a_file_that_hides_a_package_is_named(tmp_path: Path, package: str) -> None:
    (tmp_path / "src").mkdir()
    hiding = tmp_path / "src" / f"{package}.py"
    hiding.touch()
    message = f"task.command: src/{package}.py hides the package {package}: rename the file"
    assert problem(f"{sys.executable} src/{package}.py", tmp_path) == message
    (tmp_path / "src" / "train.py").touch()
    assert problem(f"{sys.executable} src/train.py", tmp_path) == message
    brought = ["train.py", f"{package}.py"]
    assert problem(f"{sys.executable} train.py", tmp_path, files=brought) == message.replace("src/", "")
    hiding.unlink()
    (tmp_path / "src" / package).mkdir()  # a folder of a source checkout is not a module
    check_command([sys.executable, "src/train.py"], "", tmp_path, tmp_path)


def test_what_can_run_passes(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    check_command([sys.executable, "train.py"], "", tmp_path, tmp_path)
    check_command(["sh", "-c", "cd src && python train.py"], "/usr/bin:/bin", tmp_path, tmp_path)
