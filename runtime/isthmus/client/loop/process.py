"""The process around a training script: its signals, its uncaught exceptions, its end."""

import atexit
import functools
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from ..errors import FederationError
from .child_processes import Place

log = logging.getLogger("isthmus")

_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]

EXIT_TERMINATED = 128 + signal.SIGTERM
_TRACEBACK_LINES = 20
_LONGEST_LINE = 1000  # characters
# How long after the script has left its loop an uncaught exception may reach a hook. In a notebook the traceback is put
# into colours first, which takes its time on a busy machine. Seconds.
_HOOK_SECONDS, _NOTEBOOK_HOOK_SECONDS = 2.0, 20.0


class ProcessWatch:
    """From its creation to :meth:`end` SIGTERM sets ``stopping``, and an exception that nobody catches is reported.

    Python's own hook tells of an exception in a script, that of ``threading`` of one in a thread, and IPython (which a
    notebook's kernel is) at the end of a cell. ``close`` is called after a report, and when the process ends.
    In a fork of the process none of this happens; there ``abandon`` is called instead, at once.
    """

    def __init__(
        self,
        stopping: threading.Event,
        report: Callable[[BaseException], None],
        close: Callable[[], None],
        abandon: Callable[[], None],
    ) -> None:
        self._stopping, self._report, self._abandon = stopping, report, abandon
        self._close_connection = close
        self._left = False
        self._thread = threading.current_thread()
        self._previous_hook, sys.excepthook = sys.excepthook, self._hook
        self._previous_thread_hook, threading.excepthook = threading.excepthook, self._thread_hook
        self._events = _notebook_events()
        if self._events is not None:
            self._events.register("post_run_cell", self._cell_ended)
        self._previous_handler: Any = None
        # Elsewhere Python allows no handlers: a notebook's server, say, ends its kernels by itself.
        self._handles_signals = self._thread is threading.main_thread()
        if self._handles_signals:
            self._previous_handler = signal.signal(signal.SIGTERM, self._stop)
        self._timer: threading.Timer | None = None
        atexit.register(self._at_exit)
        self._forked = False
        self._place = Place(self._let_go)

    def end(self) -> None:
        """The loop is over."""
        self._end_signals()
        self._unhook()
        atexit.unregister(self._at_exit)
        self._place.release()

    def leave(self) -> None:
        """The script has left the loop: by a break, or by an exception, which reaches a hook in a moment."""
        if self._forked:
            return
        self._left = True
        self._end_signals()
        patience = _HOOK_SECONDS if self._events is None else _NOTEBOOK_HOOK_SECONDS
        self._timer = threading.Timer(patience, self._close)
        self._timer.daemon = True
        self._timer.start()

    def _let_go(self) -> None:
        """Undo in a fork of the process what was set up here; its parent goes on with all of it."""
        self._forked = True
        if self._handles_signals and signal.getsignal(signal.SIGTERM) == self._stop:
            self._end_signals()
        self._handles_signals = False
        self._unhook()
        atexit.unregister(self._at_exit)
        self._abandon()

    def _close(self) -> None:
        if not self._forked:
            self._close_connection()
            self._place.release()

    def _end_signals(self) -> None:
        # A generator may be closed in any thread.
        if self._handles_signals and threading.current_thread() is threading.main_thread():
            self._handles_signals = False
            signal.signal(signal.SIGTERM, self._previous_handler or signal.SIG_DFL)

    def _unhook(self) -> None:
        # Whoever has put hooks over ours keeps them, and ours below.
        if sys.excepthook == self._hook:
            sys.excepthook = self._previous_hook
        if threading.excepthook == self._thread_hook:
            threading.excepthook = self._previous_thread_hook
        if self._events is not None:
            self._events.unregister("post_run_cell", self._cell_ended)
            self._events = None

    def _stop(self, number: int, frame: FrameType | None) -> None:
        log.warning("told to stop (%s)", signal.Signals(number).name)
        self._stopping.set()

    def _at_exit(self) -> None:
        if self._timer is not None:  # no thread of ours may be at work while the interpreter goes
            self._timer.cancel()
            self._timer.join()
        self._close()

    def _uncaught(self, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, KeyboardInterrupt):
            self._report(error)
        self._close()

    def _hook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._uncaught(error)
        _show(self._previous_hook, kind, error, trace)

    def _thread_hook(self, args: "threading.ExceptHookArgs", /) -> None:
        if args.thread is self._thread:
            self._uncaught(args.exc_value)
        self._previous_thread_hook(args)

    def _cell_ended(self, result: Any = None) -> None:
        # A loop over several cells, next(rounds) in each, goes on.
        if self._left:
            self._unhook()
            self._uncaught(getattr(result, "error_in_exec", None))


def _notebook_events() -> Any:
    """The events of IPython, where the script runs in one."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return None if shell is None else shell.events


def end_without_trace() -> None:
    """From now on a :class:`FederationError` that nobody catches ends the script with what it says, without a trace."""
    if getattr(sys.excepthook, "func", None) is not _show:
        sys.excepthook = functools.partial(_show, sys.excepthook)


def _show(previous: _Hook, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, FederationError):
        print(f"isthmus.{_said(error)}", file=sys.stderr)
    else:
        previous(kind, error, trace)


def last_lines(error: BaseException) -> str:
    """The end of an exception's traceback; of a :class:`FederationError`, which has nothing to trace, what it says."""
    said = _said(error) if isinstance(error, FederationError) else _sendable("".join(traceback.format_exception(error)))
    return "\n".join(line[:_LONGEST_LINE] for line in said.splitlines()[-_TRACEBACK_LINES:])


def one_line(error: BaseException) -> str:
    """An exception's kind and what it says."""
    return _said(error).splitlines()[0][:_LONGEST_LINE]


def _said(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as second:
        text = f"(its str() raises {type(second).__name__})"
    return f"{type(error).__name__}: {_sendable(text)}"


def _sendable(text: str) -> str:
    """Replace what is no Unicode: the name of a file may hold bytes that are none."""
    return text.encode(errors="backslashreplace").decode()
