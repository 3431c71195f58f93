"""What Slurm's words about a failed submission mean, whichever way they came."""

import re

_AMBIGUOUS = re.compile(
    r"timed? ?out|unable to contact|socket|connect|communicat|transport|zero bytes|unexpected message|i/o error"
    r"|interrupted|insane message|header lengths|protocol|credential|munge",
    re.IGNORECASE,
)
_TRANSIENT = re.compile(r"limit|temporarily|try again|queue full|too many|resource.*unavailable", re.IGNORECASE)
# Limits that no waiting changes: the request itself is above them.
_PERMANENT_LIMIT = re.compile(r"time limit|node limit|MaxArraySize|TimeLimit|MinSize|array spec", re.IGNORECASE)


def ambiguous(message: str) -> bool:
    """Whether Slurm may have been heard: what it did is not known."""
    return bool(_AMBIGUOUS.search(message))


def transient(message: str) -> bool:
    """Whether the same request may pass later."""
    return bool(_TRANSIENT.search(message)) and not _PERMANENT_LIMIT.search(message)
