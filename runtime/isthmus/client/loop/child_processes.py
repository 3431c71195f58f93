"""Child processes of a client: they inherit its memory and its environment, but are no clients themselves.

Without these measures a fork would keep the signal handler, the hooks and the connection of its parent, and a newly
started process, which finds the same ``ISTHMUS_`` environment, would connect as the same client.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from weakref import WeakSet

from isthmus_contracts import identities

from ..errors import FederationError

# Holds the id of the process that is the client which this environment describes, while it is connected.
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


class ClientClaim:
    """This process's claim to be the client that its environment describes, until :meth:`release`.

    ``abandon`` is called in each fork of the process.
    """

    def __init__(self, abandon: Callable[[], None]) -> None:
        self.abandon = abandon
        _claims.add(self)
        os.environ[_ENV_TAKEN_BY] = str(os.getpid())

    def release(self) -> None:
        """Leave the client to another process. Calling it again has no effect."""
        if self in _claims:
            _claims.discard(self)
            if not _claims:
                os.environ.pop(_ENV_TAKEN_BY, None)


_claims: WeakSet[ClientClaim] = WeakSet()


class _Mask(threading.local):
    """The signals that a thread blocked before it began to fork."""

    before: set[int] | None = None


_mask = _Mask()


def _before_fork() -> None:
    # Python forgets signals that a fork receives before it has set itself up. The kernel keeps blocked ones pending.
    if _claims:
        _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork_in_child() -> None:
    for claim in list(_claims):
        claim.abandon()
    _after_fork()


def _after_fork() -> None:
    if _mask.before is not None:
        before, _mask.before = _mask.before, None
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def refuse_children() -> None:
    """Raise :class:`FederationError` in a child of a process that is connected as a client."""
    parent = multiprocessing.parent_process()
    parents = {str(os.getppid()), str(parent.pid) if parent is not None else ""}
    # While multiprocessing prepares a child it imports the script, for its functions.
    is_prepared = getattr(multiprocessing.current_process(), "_inheriting", False)
    if os.environ.get(_ENV_TAKEN_BY) in parents or (is_prepared and os.environ.get(identities.ENV_ENDPOINT)):
        # Lightning's launcher starts the script again for each of the other ranks, and numbers them.
        is_rank = not is_prepared and int(os.environ.get("WORLD_SIZE") or 1) > 1
        raise FederationError(_REFUSAL + (_LAUNCH if is_rank else _KEEP))
