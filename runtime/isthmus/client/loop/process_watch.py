"""Signals, uncaught exceptions and exit of the process that runs a training script."""

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
from .child_processes import ClientClaim

log = logging.getLogger("isthmus")

_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]

EXIT_TERMINATED = 128 + signal.SIGTERM
_TRACEBACK_LINES = 20
_LONGEST_LINE = 1000  # characters
# Time for an uncaught exception to reach a hook after the script has left its loop. A notebook first renders the
# traceback in colour, which is slow on a busy machine. Seconds.
_HOOK_SECONDS, _NOTEBOOK_HOOK_SECONDS = 2.0, 20.0


class ProcessWatch:
    """Handlers and hooks of the process, from creation to :meth:`end`.

    SIGTERM sets ``stopping``, and an uncaught exception is passed to ``report``: one in a script through
    ``sys.excepthook``, one in a thread through ``threading.excepthook``, and one in a notebook through IPython's event
    at the end of a cell. ``close`` is called after a report, and when the process exits.
    In a fork of the process none of this happens; there ``abandon`` is called immediately.
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
        # Python allows signal handlers in the main thread only. A notebook's server ends its kernels by other means.
        self._handles_signals = self._thread is threading.main_thread()
        if self._handles_signals:
            self._previous_handler = signal.signal(signal.SIGTERM, self._stop)
        self._timer: threading.Timer | None = None
        atexit.register(self._at_exit)
        self._forked = False
        self._claim = ClientClaim(self._abandon_in_fork)

    def end(self) -> None:
        """Stop watching: the loop is over."""
        self._end_signals()
        self._unhook()
        atexit.unregister(self._at_exit)
        self._claim.release()

    def leave(self) -> None:
        """Handle that the script has left the loop: by a break, or by an exception that is about to reach a hook."""
        if self._forked:
            return
        self._left = True
        self._end_signals()
        patience = _HOOK_SECONDS if self._events is None else _NOTEBOOK_HOOK_SECONDS
        self._timer = threading.Timer(patience, self._close)
        self._timer.daemon = True
        self._timer.start()

    def _abandon_in_fork(self) -> None:
        """Undo in a fork of the process what was set up here; it stays in place in the parent."""
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
            self._claim.release()

    def _end_signals(self) -> None:
        # A generator may be closed in any thread.
        if self._handles_signals and threading.current_thread() is threading.main_thread():
            self._handles_signals = False
            signal.signal(signal.SIGTERM, self._previous_handler or signal.SIG_DFL)

    def _unhook(self) -> None:
        # If other hooks have replaced these, they stay, and call these.
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
        if self._timer is not None:  # no thread of the library may run while the interpreter shuts down
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
        # A loop that spans several cells, with next(rounds) in each, is not over.
        if self._left:
            self._unhook()
            self._uncaught(getattr(result, "error_in_exec", None))


def _notebook_events() -> Any:
    """Return IPython's event manager if the script runs in IPython."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return None if shell is None else shell.events


def hide_federation_tracebacks() -> None:
    """Let an uncaught :class:`FederationError` end the script with its message alone, without a traceback."""
    if getattr(sys.excepthook, "func", None) is not _show:
        sys.excepthook = functools.partial(_show, sys.excepthook)


def _show(previous: _Hook, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, FederationError):
        print(f"isthmus.{_message(error)}", file=sys.stderr)
    else:
        previous(kind, error, trace)


def traceback_tail(error: BaseException) -> str:
    """Return the last lines of an exception's traceback; of a :class:`FederationError` only its message."""
    is_plain = isinstance(error, FederationError)
    text = _message(error) if is_plain else _sendable("".join(traceback.format_exception(error)))
    return "\n".join(line[:_LONGEST_LINE] for line in text.splitlines()[-_TRACEBACK_LINES:])


def error_line(error: BaseException) -> str:
    """Return an exception's type and message in one line."""
    return _message(error).splitlines()[0][:_LONGEST_LINE]


def _message(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as second:
        text = f"(its str() raises {type(second).__name__})"
    return f"{type(error).__name__}: {_sendable(text)}"


def _sendable(text: str) -> str:
    """Escape lone surrogates: a file name may hold bytes that are not valid Unicode."""
    return text.encode(errors="backslashreplace").decode()
