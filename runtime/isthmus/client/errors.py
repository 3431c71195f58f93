"""Errors that the client library raises in a training script."""

# The error message in a fork of the client's process that continues the loop.
FORKED_PROCESS = (
    "this process was forked from the client's process: a fork must not continue the loop of isthmus.rounds(),"
    " and must end with os._exit(), as those of multiprocessing do"
)


class FederationError(RuntimeError):
    """The federation has ended for this client with an error. ``str()`` gives the reason."""


class ScriptError(FederationError, ValueError):
    """An invalid request of the script. ``str()`` gives the reason and the remedy."""
