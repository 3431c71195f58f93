"""Errors that the client library raises in a training script."""

# What a fork of the client's process hears that goes on as if it were the client.
IN_A_FORK = (
    "this process was forked from the client's, which takes part by itself: a fork must leave the loop of"
    " isthmus.rounds() alone, and end with os._exit(), as those of multiprocessing do"
)


class FederationError(RuntimeError):
    """The federation has ended for this client, and not well. ``str()`` says why."""


class ScriptError(FederationError, ValueError):
    """The script asks for what cannot be done. ``str()`` says what, and how to put it right."""
