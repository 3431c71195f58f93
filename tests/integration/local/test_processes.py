"""Programs under their supervisors: they leave no processes behind, and no other process is signalled."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from isthmus.local.child_process import ChildProcess

DEADLINE = 120.0
# Process trees as launchers make them: a child in the group, one in a session of its own, and a grandchild whose
# parents have ended, in a third session. Each writes its process id.
FAMILY = """
sh -c 'echo $$ > group; exec sleep 1000' &
setsid sh -c 'echo $$ > session; exec sleep 1000' &
(setsid sh -c 'sh -c "echo \\$\\$ > orphan; exec sleep 1000" &' &)
while ! [ -s group ] || ! [ -s session ] || ! [ -s orphan ]; do sleep 0.05; done
"""
MEMBERS = ("group", "session", "orphan")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def await_that(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def members(directory: Path) -> list[int]:
    return [int((directory / name).read_text()) for name in MEMBERS]


def run(directory: Path, work: Callable[[ChildProcess], Awaitable[None]], *argv: str) -> ChildProcess:
    """Run a program in the directory, and call ``work`` with it."""

    async def main() -> ChildProcess:
        child = await ChildProcess.spawn(argv, dict(os.environ), directory / "log", directory)
        await work(child)
        return child

    return asyncio.run(main())


async def exit_code(child: ChildProcess, code: int) -> None:
    assert await child.wait() == code


@pytest.mark.parametrize(
    ("program", "code"),
    [("exit 0", 0), ("exit 7", 7), ("kill -SEGV $$", -signal.SIGSEGV), ("kill -KILL $$", -signal.SIGKILL)],
)
def test_a_program_ends_as_it_would_alone(tmp_path: Path, program: str, code: int) -> None:
    run(tmp_path, lambda child: exit_code(child, code), "sh", "-c", program)


def test_a_program_that_cannot_start_is_named(tmp_path: Path) -> None:
    child = run(tmp_path, lambda child: exit_code(child, 127), "no-such-program")
    assert child.last_lines(1) == ["no-such-program: No such file or directory"]


def test_a_broken_pipe_ends_a_program_as_in_a_shell(tmp_path: Path) -> None:
    """SIGPIPE, which Python ignores, is not ignored in the program."""
    child = run(tmp_path, lambda child: exit_code(child, 0), "sh", "-c", "yes | head -n 1")
    assert child.last_lines(5) == ["y"]  # and no error message of `yes`


def test_the_end_of_a_log_is_fit_for_a_terminal(tmp_path: Path) -> None:
    program = r"printf '\377 50%%\r\033]0;owned\007  in\033[31m\n\n'; head -c 5000 /dev/zero | tr '\0' x"
    child = run(tmp_path, lambda child: exit_code(child, 0), "sh", "-c", program)
    assert child.last_lines(9) == ["\ufffd 50%", " ]0;owned   in [31m", "x" * 297 + "..."]


def test_what_a_program_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    run(tmp_path, lambda child: exit_code(child, 3), "sh", "-c", FAMILY + "exit 3")
    assert not any(alive(pid) for pid in members(tmp_path))


@pytest.mark.parametrize("trap", ["trap '' TERM", "trap 'exit 4' TERM"])
def test_a_stopped_program_ends_with_all_that_it_started(tmp_path: Path, trap: str) -> None:
    async def stop(child: ChildProcess) -> None:
        await asyncio.to_thread(await_that, (tmp_path / "ready").exists, "the family is there")
        patient = "exit" in trap
        await child.stop(DEADLINE if patient else 0.2, asyncio.Event())
        assert await child.wait() == (4 if patient else -signal.SIGKILL)

    run(tmp_path, stop, "sh", "-c", f"{trap}\n{FAMILY}\n: > ready\nwhile :; do sleep 0.05; done")
    assert not any(alive(pid) for pid in members(tmp_path))


def test_a_script_finishes_though_the_shell_around_it_has_gone(tmp_path: Path) -> None:
    """The signal ends the shell immediately, and the script still submits its update."""
    script = "trap 'sleep 1; echo handed in; exit 0' TERM; : > ready; while :; do sleep 0.05; done"

    async def stop(child: ChildProcess) -> None:
        await asyncio.to_thread(await_that, (tmp_path / "ready").exists, "it runs")
        await child.stop(DEADLINE, asyncio.Event())

    child = run(tmp_path, stop, "sh", "-c", f'setsid sleep 1000 & sh -c "{script}"; echo never')
    lines = child.last_lines(9)
    assert lines[-1] == "handed in" and "never" not in lines


RUNNER = """
import asyncio, os, sys
from pathlib import Path
from isthmus.local.child_process import ChildProcess

async def main():
    child = await ChildProcess.spawn(["sh", "-c", sys.argv[1]], dict(os.environ), Path("log"), None)
    print("started", flush=True)
    await child.wait()

asyncio.run(main())
"""


def start_runner(directory: Path, program: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", RUNNER, program]
    return subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE)


def test_killing_the_runner_leaves_no_process_in_any_session(tmp_path: Path) -> None:
    runner = start_runner(tmp_path, "trap '' TERM HUP\n" + FAMILY + "\n: > ready\nsleep 1000")
    await_that((tmp_path / "ready").exists, "the family is there")
    runner.kill()
    runner.communicate()
    await_that(lambda: not any(alive(pid) for pid in members(tmp_path)), "all have ended")


def test_killing_the_supervisor_ends_the_program(tmp_path: Path) -> None:
    runner = start_runner(tmp_path, "echo $PPID > supervisor; echo $$ > program; exec sleep 1000")
    await_that(lambda: (tmp_path / "program").exists() and bool((tmp_path / "program").read_text()), "it runs")
    os.kill(int((tmp_path / "supervisor").read_text()), signal.SIGKILL)
    await_that(lambda: not alive(int((tmp_path / "program").read_text())), "it has ended")
    runner.communicate(timeout=DEADLINE)
    assert runner.returncode == 0


def test_a_program_that_has_ended_is_never_signalled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process id of an ended program may have been reused."""
    signalled: list[int] = []
    for name in ("kill", "killpg"):
        monkeypatch.setattr(os, name, lambda pid, number: signalled.append(pid))

    async def stop_late(child: ChildProcess) -> None:
        await child.wait()
        child.send(signal.SIGTERM)
        await child.stop(1.0, asyncio.Event())

    run(tmp_path, stop_late, "true")
    assert signalled == []


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """SIGHUP stays ignored, as set by nohup."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        program = "kill -HUP $PPID; kill -HUP $$; exit 5"
        run(tmp_path, lambda child: exit_code(child, 5), "sh", "-c", program)
    finally:
        signal.signal(signal.SIGHUP, handler)
