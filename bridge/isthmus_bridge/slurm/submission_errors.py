"""Classification of failed submissions by Slurm's error messages, for all adapters."""

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from .model import Patience


class Sent(Enum):
    """Possible ends of a failed submission."""

    REFUSED = "refused"
    """The controller refused it, or sbatch did not send it: there is no job."""
    PERHAPS = "perhaps"
    """The controller may have received it: only a look-up shows whether there is a job."""
    WAITING = "waiting"
    """sbatch was killed while it waited to retry. The controller may have received its last attempt."""


@dataclass(frozen=True)
class Judgement:
    """The classification of a failed submission."""

    sent: Sent
    reason: str
    """All messages of sbatch, Slurm and the site's plug-ins, in one line."""
    patience: Patience = Patience.NONE


_LONGEST_REASON = 400
_LINE = re.compile(r"^sbatch: (?:(?:error|fatal): )?(.*)$")
_FAILED = re.compile(r"^(?:Batch job submission failed|Unable to allocate resources): *(.*)$")
# sbatch prints this once, and then retries by itself for two minutes (sbatch.c, MAX_RETRIES).
RETRYING = re.compile(r"sleeping and retrying|temporarily disabled, retrying")

# Messages of slurm_errno.c about the communication with the controller, not from the controller.
_COMMUNICATION = re.compile(
    r"timed? ?out|unable to contact|socket|connect|communicat|transport|zero bytes|unexpected message|i/o error"
    r"|interrupted|insane message|header lengths|protocol|credential|munge|incomplete message"
    r"|message (?:send|receive)|broken pipe|shutdown failure|no route|unreachable",
    re.IGNORECASE,
)
_UNSPECIFIED = re.compile(r"unspecified error", re.IGNORECASE)
# Lines of Slurm's library about the communication with the controller. Messages of sites do not begin like this.
_LIBRARY = re.compile(
    r"^(?:slurm_\w+|_?slurm\w*_\w+|auth/?_?\w*|_\w+|munge|If munged|Munge|Unable to (?:contact|connect|establish)"
    r"|Error connecting|Failed to connect)\b.*",
)
# Errors of the operating system concern the communication with the controller, except EAGAIN ("try again").
_OF_THE_SYSTEM = frozenset(os.strerror(number) for number in errno.errorcode if number != errno.EAGAIN)
# sbatch could not read the configuration or resolve the controller's address: nothing was sent.
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
# Limits that the request itself exceeds, so that retrying is useless.
_PERMANENT_LIMIT = re.compile(r"time limit|node limit|MaxArraySize|TimeLimit|MinSize|array spec", re.IGNORECASE)
# The controller gets accounts and users from a database and a directory service, sometimes minutes late; an expired
# association may be renewed.
_ASSOCIATION = re.compile(
    r"invalid account|account/partition combination|invalid qos|invalid user|user id|association", re.IGNORECASE
)
# "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)": the same message for
# all limits of an account or a QOS. sbatch may print before it which one it was; a limit on the number of jobs passes.
_ACCOUNT_LIMIT = re.compile(r"violates (?:accounting/QOS )?policy", re.IGNORECASE)
_WHICH = re.compile(r"\b(?:QOS|Assoc)(?:Max|Min|Grp)\w+")
# Printed with "node configuration is not available" if no node of the site, up or down, could serve the request.
_IMPOSSIBLE = re.compile(
    r"(?:specification|per node|count) can ?not be satisfied|more processors requested|too many cpus", re.IGNORECASE
)


def of_sbatch(errors: str) -> Judgement:
    """Classify sbatch's standard error.

    Only Slurm's own message decides whether the controller may have received the request. Messages of a site's plug-in
    (job_submit.lua, cli_filter) only become part of the reason.
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
    # Refused by sbatch itself, because of its arguments or files.
    return Judgement(Sent.REFUSED, reason)


def of_slurm(sentences: Sequence[str], others: Sequence[str] = ()) -> Judgement:
    """Classify Slurm's own messages about a submission. ``others``: other messages, such as those of the site."""
    reason = in_one_line([*others, *sentences])
    for sentence in sentences:
        if _COMMUNICATION.search(sentence) or sentence in _OF_THE_SYSTEM or not sentence:
            return Judgement(Sent.PERHAPS, reason)
        if _UNSPECIFIED.search(sentence) and (not others or any(_LIBRARY.match(line) for line in others)):
            # After a message of the site's plug-in, it is the return value of job_submit.lua (slurm.ERROR).
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
    """Join lines without repetitions. If the result is too long, keep the last line, which is Slurm's own."""
    words = list(dict.fromkeys(" ".join(line.split()) for line in lines))
    if not words:
        return ""
    last = words[-1][:_LONGEST_REASON]
    first = "; ".join(words[:-1])
    room = _LONGEST_REASON - len(last) - 2
    if not first or room < 16:
        return last
    return f"{first if len(first) <= room else first[: room - 1] + '…'}; {last}"
