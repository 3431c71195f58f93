"""Runs the program on its command line, and ends all that it has started: ``supervise.py PROGRAM…``.

Standard input is a pipe from the runner. Each byte that comes through it is the number of a signal for the program's
process group. When the pipe ends, the runner wants everything ended, or is gone itself, whatever killed it.

On Linux the supervisor adopts the program's descendants, also those that have left its session, and kills whichever are
left when the program ends. It signals processes that it has not reaped yet and no others, so the kernel cannot have
given their numbers away. It then ends as the program did: with its exit code, or by its signal.

Run by its path, in an interpreter of its own, so that the runner need not run Python code between fork and exec: it has
threads (gRPC's among them), after whose fork only exec is safe. Imports nothing but the standard library.
"""

import ctypes
import os
import select
import signal
import sys
from contextlib import suppress

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36  # <linux/prctl.h>
EXIT_NOT_FOUND = 127
_LIFELINE, _LOG = 0, 2
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main() -> None:
    """Starts the program, looks after it until it ends or has to, and ends likewise."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    waking, waker = os.pipe()
    os.set_blocking(waking, False)
    os.set_blocking(waker, False)
    program = _start(sys.argv[1:])
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, *_FORWARDED):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # its number comes through the pipe
    status = _look_after(program, waking)
    swept = _sweep(program)
    _end_like(swept if status is None else status)


def _start(argv: list[str]) -> int:
    """The program's process, which leads a session and a process group of its own."""
    parent = os.getpid()
    if program := os.fork():
        return program
    try:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # killed before the line above
            os._exit(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), _LIFELINE)
        os.dup2(_LOG, 1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and the program would inherit that
            signal.signal(number, signal.SIG_DFL)
        os.execvp(argv[0], argv)  # noqa: S606 (an argument list, no shell)
    except OSError as error:
        os.write(_LOG, f"{argv[0]}: {error.strerror}\n".encode(errors="replace"))
    finally:
        os._exit(EXIT_NOT_FOUND)


def _look_after(program: int, waking: int) -> int | None:
    """Passes signals on until the program ends; its wait status, or None where the runner wants its end."""
    if (status := _reap(program)) is not None:  # before we listened
        return status
    told = False
    while True:
        signals = _await_signals(waking)
        if (status := _reap(program)) is not None:  # from here to the next look the group's number is its own
            if told:
                _await_group(program, waking)
            return status
        if signals is None:
            os.killpg(program, signal.SIGKILL)
            return None
        for number in signals:
            os.killpg(program, number)
            told = True


def _await_group(program: int, waking: int) -> None:
    """Waits until the rest of the program's group has ended, too, or the runner is out of patience.

    A shell ends at once by the signal after which the script that it runs may still hand something in.
    """
    with suppress(ChildProcessError):  # nobody is left
        while _reap(program) is None and any(group == program for _, group in _children()):
            if _await_signals(waking) is None:
                return


def _await_signals(waking: int) -> list[int] | None:
    """Waits for something to happen; the signals that the group is to get, or None when the runner wants its end."""
    poll = select.poll()
    poll.register(_LIFELINE, select.POLLIN)
    poll.register(waking, select.POLLIN)
    ready = [descriptor for descriptor, _ in poll.poll()]
    signals = [number for number in os.read(waking, 4096) if number in _FORWARDED] if waking in ready else []
    if _LIFELINE in ready:
        theirs = os.read(_LIFELINE, 64)
        if not theirs:
            return None
        signals += theirs
    return signals


def _reap(program: int) -> int | None:
    """Reaps what has ended, adopted processes included; the program's wait status, once it is among them."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == program:
            return status
        if not pid:
            return None


def _sweep(program: int) -> int:
    """Kills every process that is left, generation by generation; the program's wait status, if it is among them."""
    result = 0
    while True:
        killed = [pid for pid, _ in _children() if _kill(pid)]
        try:
            # Where nothing could be killed, what is left has become another user's.
            pid, status = os.waitpid(-1, 0 if killed else os.WNOHANG)
        except ChildProcessError:
            return result
        if pid == program:
            result = status
        if not pid:
            return result


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except PermissionError:
        return False
    return True


def _children() -> list[tuple[int, int]]:
    """Our children and those that we have adopted, ended ones included until they are reaped, each with its group."""
    found, us = [], os.getpid()
    try:
        with os.scandir("/proc") as entries:
            for entry in entries:
                if entry.name.isdigit():
                    parent, group = _parent_and_group(entry.path)
                    if parent == us:
                        found.append((int(entry.name), group))
    except OSError:  # not Linux
        return []
    return found


def _parent_and_group(process: str) -> tuple[int, int]:
    """Of the process with this directory in /proc; zeros where it has just gone."""
    try:
        file = os.open(f"{process}/stat", os.O_RDONLY)
    except OSError:
        return 0, 0
    try:
        # After the program's name, which may hold spaces and parentheses: state, parent, group.
        fields = os.read(file, 4096).rpartition(b")")[2].split()
        return int(fields[1]), int(fields[2])
    except OSError:
        return 0, 0
    finally:
        os.close(file)


def _end_like(status: int) -> None:
    """Ends this process with the program's wait status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        _prctl(_PR_SET_DUMPABLE, 0)  # the program may have left a core; ours is of no use
        with suppress(OSError):  # SIGKILL cannot be set
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


if __name__ == "__main__":
    main()
