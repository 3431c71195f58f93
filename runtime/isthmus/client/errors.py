"""Errors that the client library raises in a training script."""

# The error in a fork of the client's process that goes on as if it were the client.
FORKED_PROCESS = (
    "this process was forked from the client's, which takes part by itself: a fork must leave the loop of"
    " isthmus.rounds() alone, and end with os._exit(), as those of multiprocessing do"
)


class FederationError(RuntimeError):
    """The federation has ended for this client with an error. ``str()`` gives the reason."""


class ScriptError(FederationError, ValueError):
    """An invalid request of the script. ``str()`` gives the reason and the remedy."""
