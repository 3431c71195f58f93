"""What Slurm's words about a failed submission mean, whichever way they came."""

import errno
import os
import re

_AMBIGUOUS = re.compile(
    r"timed? ?out|unable to contact|socket|connect|communicat|transport|zero bytes|unexpected message|i/o error"
    r"|interrupted|insane message|header lengths|protocol|credential|munge"
    r"|message (?:send|receive)|broken pipe|unspecified|shutdown failure|no route|unreachable",
    re.IGNORECASE,
)
# The controller says no in words of Slurm's. Those of the system tell what befell sbatch while it talked to it; one
# stands for "try again".
_FAILED = re.compile(r"Batch job submission failed: *(.*?) *$", re.MULTILINE)
_OF_THE_SYSTEM = frozenset(os.strerror(number) for number in errno.errorcode if number != errno.EAGAIN)
_TRANSIENT = re.compile(
    r"limit|temporarily|try again|queue full|too many|resource.*unavailable|standby|shutting down", re.IGNORECASE
)
# Limits that no waiting changes: the request itself is above them.
_PERMANENT_LIMIT = re.compile(r"time limit|node limit|MaxArraySize|TimeLimit|MinSize|array spec", re.IGNORECASE)
# "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)": one sentence for every limit
# of an account or a QOS. sbatch may say before it which one it was; that on the number of jobs passes.
_ACCOUNT_LIMIT = re.compile(r"violates (?:accounting/QOS )?policy", re.IGNORECASE)
_WHICH = re.compile(r"\b(?:QOS|Assoc)(?:Max|Min|Grp)\w+")


def ambiguous(message: str) -> bool:
    """Whether Slurm may have been heard: what it did is not known."""
    return bool(_AMBIGUOUS.search(message)) or not _OF_THE_SYSTEM.isdisjoint(_FAILED.findall(message))


def transient(message: str, before: str = "") -> bool:
    """Whether the same request may pass later. ``before``: what else was said."""
    if _ACCOUNT_LIMIT.search(message):
        which = _WHICH.findall(f"{before}\n{message}")
        return not which or any("Submit" in one for one in which)
    return bool(_TRANSIENT.search(message)) and not _PERMANENT_LIMIT.search(message)
