"""Classifies a failed submission by the words of Slurm, whichever adapter they came through."""

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from .model import Patience


class Sent(Enum):
    """How far a failed submission came."""

    REFUSED = "refused"
    """The controller answered no, or sbatch never asked it: there is no job."""
    PERHAPS = "perhaps"
    """The controller may have heard it: only a look-up shows whether there is a job."""
    WAITING = "waiting"
    """sbatch was between two tries of its own when it was ended. The last try may have been heard."""


@dataclass(frozen=True)
class Judgement:
    """The verdict on a failed submission."""

    sent: Sent
    reason: str
    """All that sbatch, Slurm and the site's plug-ins said, in one line."""
    patience: Patience = Patience.NONE


_LONGEST_REASON = 400
_LINE = re.compile(r"^sbatch: (?:(?:error|fatal): )?(.*)$")
_FAILED = re.compile(r"^(?:Batch job submission failed|Unable to allocate resources): *(.*)$")
# sbatch says this once, and then tries again by itself for two minutes (sbatch.c, MAX_RETRIES).
RETRYING = re.compile(r"sleeping and retrying|temporarily disabled, retrying")

# Sentences of slurm_errno.c about the way to the controller, not of the controller.
_COMMUNICATION = re.compile(
    r"timed? ?out|unable to contact|socket|connect|communicat|transport|zero bytes|unexpected message|i/o error"
    r"|interrupted|insane message|header lengths|protocol|credential|munge|incomplete message"
    r"|message (?:send|receive)|broken pipe|shutdown failure|no route|unreachable",
    re.IGNORECASE,
)
_UNSPECIFIED = re.compile(r"unspecified error", re.IGNORECASE)
# Lines of Slurm's library about the way to the controller. A site's own sentence does not begin like this.
_LIBRARY = re.compile(
    r"^(?:slurm_\w+|_?slurm\w*_\w+|auth/?_?\w*|_\w+|munge|If munged|Munge|Unable to (?:contact|connect|establish)"
    r"|Error connecting|Failed to connect)\b.*",
)
# Words of the operating system tell what befell sbatch while it talked to the controller; one stands for "try again".
_OF_THE_SYSTEM = frozenset(os.strerror(number) for number in errno.errorcode if number != errno.EAGAIN)
# sbatch could not read the configuration or find the controller's address: nothing was sent.
_BEFORE_SENDING = re.compile(
    r"configuration (?:source|file|server)|configless|resolve_ctls|fetch_config|DNS SRV|getaddrinfo|host name lookup"
    r"|Unable to resolve|name resolution|SlurmUser|slurm\.conf|plugin|passwd|getpwuid|user name|uid_from"
    r"|Unable to determine|NSS",
    re.IGNORECASE,
)

_QUEUE = re.compile(
    r"limit|temporarily|try again|queue full|too many|resource.*unavailable|standby|shutting down"
    r"|partition not available|partition configuration not available|node configuration is not available"
    r"|nodes? (?:are |is )?busy|reservation (?:is )?(?:in use|busy)|not usable now|licen[cs]es? (?:not )?avail"
    r"|currently (?:disabled|unavailable)|draining|inactive",
    re.IGNORECASE,
)
# Limits that no waiting changes: the request itself is above them.
_PERMANENT_LIMIT = re.compile(r"time limit|node limit|MaxArraySize|TimeLimit|MinSize|array spec", re.IGNORECASE)
# Accounts and users reach the controller from a database and a directory service, sometimes minutes late; an expired
# association may be renewed.
_ASSOCIATION = re.compile(
    r"invalid account|account/partition combination|invalid qos|invalid user|user id|association", re.IGNORECASE
)
# "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)": one sentence for every limit
# of an account or a QOS. sbatch may say before it which one it was; that on the number of jobs passes.
_ACCOUNT_LIMIT = re.compile(r"violates (?:accounting/QOS )?policy", re.IGNORECASE)
_WHICH = re.compile(r"\b(?:QOS|Assoc)(?:Max|Min|Grp)\w+")
# Said beside "node configuration is not available" where no node of the site, up or down, could serve the request.
_IMPOSSIBLE = re.compile(
    r"(?:specification|per node|count) can ?not be satisfied|more processors requested|too many cpus", re.IGNORECASE
)


def of_sbatch(errors: str) -> Judgement:
    """Judges sbatch's standard error, line by line.

    Only Slurm's own sentence decides whether the controller may have heard the request: the words of a site's plug-in
    (job_submit.lua, cli_filter) become part of the reason, whatever they are.
    """
    lines = [match[1].strip() for line in errors.splitlines() if (match := _LINE.match(line.strip()))]
    lines = [line for line in lines if line]
    sentences = [match[1].strip() for line in lines if (match := _FAILED.match(line))]
    others = [line for line in lines if not _FAILED.match(line)]
    if sentences:
        return of_slurm(sentences[-1:], others)
    reason = in_one_line(others)
    if any(RETRYING.search(line) for line in others):
        return Judgement(Sent.WAITING, reason, Patience.QUEUE)
    if any(_BEFORE_SENDING.search(line) for line in others):
        return Judgement(Sent.REFUSED, reason, Patience.QUEUE)
    if not others or any(_COMMUNICATION.search(line) for line in others):
        return Judgement(Sent.PERHAPS, reason)
    # sbatch's own no, about its arguments and files.
    return Judgement(Sent.REFUSED, reason)


def of_slurm(sentences: Sequence[str], others: Sequence[str] = ()) -> Judgement:
    """Judges Slurm's own sentences about a submission. ``others``: what else was said, such as a site's own words."""
    reason = in_one_line([*others, *sentences])
    for sentence in sentences:
        if _COMMUNICATION.search(sentence) or sentence in _OF_THE_SYSTEM or not sentence:
            return Judgement(Sent.PERHAPS, reason)
        if _UNSPECIFIED.search(sentence) and (not others or any(_LIBRARY.match(line) for line in others)):
            # After a line of the site's plug-in it is the number that job_submit.lua returned (slurm.ERROR).
            return Judgement(Sent.PERHAPS, reason)
    return Judgement(Sent.REFUSED, reason, _patience(" ".join(sentences), " ".join(others)))


def _patience(sentence: str, before: str) -> Patience:
    if _ACCOUNT_LIMIT.search(sentence):
        which = _WHICH.findall(f"{before} {sentence}")
        return Patience.QUEUE if not which or any("Submit" in one for one in which) else Patience.NONE
    if _PERMANENT_LIMIT.search(sentence) or _IMPOSSIBLE.search(before):
        return Patience.NONE
    if _QUEUE.search(sentence):
        return Patience.QUEUE
    return Patience.HOUR if _ASSOCIATION.search(sentence) else Patience.NONE


def in_one_line(lines: Sequence[str]) -> str:
    """Joins lines without repetitions; the last one, Slurm's own, is kept where the whole is too long."""
    words = list(dict.fromkeys(" ".join(line.split()) for line in lines))
    if not words:
        return ""
    last = words[-1][:_LONGEST_REASON]
    first = "; ".join(words[:-1])
    room = _LONGEST_REASON - len(last) - 2
    if not first or room < 16:
        return last
    return f"{first if len(first) <= room else first[: room - 1] + '…'}; {last}"
