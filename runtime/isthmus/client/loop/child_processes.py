"""Child processes of a client: they inherit its memory and its environment, and take no part in the federation.

A fork would otherwise keep the signal handler, the hooks and the connection of the process that it was made from; a
process that is started afresh finds the same ``ISTHMUS_`` environment, and would take its parent's place.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from weakref import WeakSet

from isthmus_contracts import identities

from ..errors import FederationError

# Names the process whose client this environment describes, while that client takes part.
_ENV_TAKEN_BY = "ISTHMUS_TAKEN_BY"
_REFUSAL = (
    "this process is a child of the client's process, which takes part already: isthmus.rounds() must not be called"
    " here. "
)
_KEEP = 'A script that starts processes keeps its own code under `if __name__ == "__main__":`'
_LAUNCH = (
    "Several processes make one client when torchrun starts the script, rather than a trainer within it, and the script"
    " calls torch.distributed.init_process_group() before isthmus.rounds()"
)


class Place:
    """A client's place in the federation, which this process takes until :meth:`release`.

    ``let_go`` is called in each fork of the process.
    """

    def __init__(self, let_go: Callable[[], None]) -> None:
        self.let_go = let_go
        _taken.add(self)
        os.environ[_ENV_TAKEN_BY] = str(os.getpid())

    def release(self) -> None:
        """Leave the place to another process. Calling it again changes nothing."""
        if self in _taken:
            _taken.discard(self)
            if not _taken:
                os.environ.pop(_ENV_TAKEN_BY, None)


_taken: WeakSet[Place] = WeakSet()


class _Mask(threading.local):
    """The signals that a thread blocked before it began to fork."""

    before: set[int] | None = None


_mask = _Mask()


def _before_fork() -> None:
    # Python forgets signals that a fork gets before it has set itself up. The kernel keeps those that are blocked.
    if _taken:
        _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork_in_child() -> None:
    for place in list(_taken):
        place.let_go()
    _after_fork()


def _after_fork() -> None:
    if _mask.before is not None:
        before, _mask.before = _mask.before, None
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def refuse_children() -> None:
    """Raise :class:`FederationError` in a child of a process that takes part."""
    parent = multiprocessing.parent_process()
    parents = {str(os.getppid()), str(parent.pid) if parent is not None else ""}
    # While multiprocessing prepares a child it imports the script, for the functions in it.
    is_prepared = getattr(multiprocessing.current_process(), "_inheriting", False)
    if os.environ.get(_ENV_TAKEN_BY) in parents or (is_prepared and os.environ.get(identities.ENV_ENDPOINT)):
        # Lightning's launcher starts the script again for each of the other ranks, and numbers them.
        is_rank = not is_prepared and int(os.environ.get("WORLD_SIZE") or 1) > 1
        raise FederationError(_REFUSAL + (_LAUNCH if is_rank else _KEEP))
