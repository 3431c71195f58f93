"""Supervisor that runs a program and ends all processes that it has started: ``supervisor.py PROGRAM…``.

Standard input is a pipe from the runner. Each byte in it is the number of a signal for the program's process group. The
pipe is closed if the runner wants everything to end, or if the runner itself has ended for any reason.

On Linux the supervisor adopts the program's descendants, including those that have left its session, and kills the
remaining ones when the program ends. It signals only processes that it has not reaped yet, whose ids the kernel cannot
have reused. It then ends as the program did: with its exit code, or by its signal.

It is run by its path, in a separate interpreter, so that the runner need not run Python code between fork and exec: the
runner has threads (those of gRPC among them), and after a fork of a process with threads only exec is safe. It imports
only the standard library.
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
    """Run the program until it ends or must end, kill its remaining processes, and exit with its status."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    waking, waker = os.pipe()
    os.set_blocking(waking, False)
    os.set_blocking(waker, False)
    program = _start(sys.argv[1:])
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, *_FORWARDED):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # the number arrives through the pipe
    status = _supervise(program, waking)
    swept = _sweep(program)
    _end_like(swept if status is None else status)


def _start(argv: list[str]) -> int:
    """Start the program as the leader of a new session and process group; return its process id."""
    parent = os.getpid()
    if program := os.fork():
        return program
    try:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the supervisor was killed before the line above
            os._exit(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), _LIFELINE)
        os.dup2(_LOG, 1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these; the program would inherit that
            signal.signal(number, signal.SIG_DFL)
        os.execvp(argv[0], argv)  # noqa: S606 (an argument list, no shell)
    except OSError as error:
        os.write(_LOG, f"{argv[0]}: {error.strerror}\n".encode(errors="replace"))
    finally:
        os._exit(EXIT_NOT_FOUND)


def _supervise(program: int, waking: int) -> int | None:
    """Forward signals until the program ends; return its wait status, or None if the runner wants it to end."""
    if (status := _reap(program)) is not None:  # it ended before the handlers were set
        return status
    forwarded = False
    while True:
        signals = _await_signals(waking)
        if (status := _reap(program)) is not None:  # until the next reaping, the group's id cannot be reused
            if forwarded:
                _await_group(program, waking)
            return status
        if signals is None:
            os.killpg(program, signal.SIGKILL)
            return None
        for number in signals:
            os.killpg(program, number)
            forwarded = True


def _await_group(program: int, waking: int) -> None:
    """Wait until the rest of the program's group has ended, or the runner ends the wait.

    A shell ends immediately by a signal after which its script may still submit an update.
    """
    with suppress(ChildProcessError):  # no process is left
        while _reap(program) is None and any(group == program for _, group in _children()):
            if _await_signals(waking) is None:
                return


def _await_signals(waking: int) -> list[int] | None:
    """Wait for an event; return the signals to forward to the group, or None if the runner wants it to end."""
    poll = select.poll()
    poll.register(_LIFELINE, select.POLLIN)
    poll.register(waking, select.POLLIN)
    ready = [descriptor for descriptor, _ in poll.poll()]
    signals = [number for number in os.read(waking, 4096) if number in _FORWARDED] if waking in ready else []
    if _LIFELINE in ready:
        requested = os.read(_LIFELINE, 64)
        if not requested:
            return None
        signals += requested
    return signals


def _reap(program: int) -> int | None:
    """Reap ended processes, including adopted ones; return the program's wait status if it is among them."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == program:
            return status
        if not pid:
            return None


def _sweep(program: int) -> int:
    """Kill all remaining processes, generation by generation; return the program's wait status if it is among them."""
    result = 0
    while True:
        killed = [pid for pid, _ in _children() if _kill(pid)]
        try:
            # If none could be killed, the remaining processes belong to another user.
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
    """Return the ids of own and adopted children, including ended ones that are not reaped, with their groups."""
    found, own = [], os.getpid()
    try:
        with os.scandir("/proc") as entries:
            for entry in entries:
                if entry.name.isdigit():
                    parent, group = _parent_and_group(entry.path)
                    if parent == own:
                        found.append((int(entry.name), group))
    except OSError:  # not Linux
        return []
    return found


def _parent_and_group(process: str) -> tuple[int, int]:
    """Return parent and group of a process, given its directory in /proc; zeros if it has just ended."""
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
    """End this process with the program's wait status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        _prctl(_PR_SET_DUMPABLE, 0)  # a core of the supervisor would be useless
        with suppress(OSError):  # SIGKILL cannot be set
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


if __name__ == "__main__":
    main()
