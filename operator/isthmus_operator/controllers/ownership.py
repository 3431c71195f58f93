"""The choice between several operators of a job: an annotation names the current one, which renews it. Pure.

Two operators with different settings (a cluster-wide one and a namespace's own, or two names for one cluster) would
undo each other's work forever and submit a pool twice.
"""

import datetime as dt
import json
from dataclasses import dataclass
from typing import Self

from ..state.observed import Job
from ..state.timestamps import parse_timestamp, timestamp

RENEWED_AFTER = dt.timedelta(minutes=5)
EXPIRES_AFTER = dt.timedelta(minutes=15)


@dataclass(frozen=True)
class Owner:
    """The content of the annotation."""

    identity: str
    renewed: dt.datetime

    @classmethod
    def of(cls, job: Job) -> Self | None:
        """Parse a job's annotation; return None if it is missing, copied or damaged."""
        try:
            content = json.loads(job.operator)
            renewed = parse_timestamp(content["renewed"])
            if content["uid"] != job.uid or renewed is None:
                return None
            return cls(str(content["operator"]), renewed)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def holds(self, now: dt.datetime) -> bool:
        """Return True if it was renewed recently. A time in the far future does not count."""
        return abs(now - self.renewed) < EXPIRES_AFTER


def identity(cluster: str, namespace: str, namespaces: tuple[str, ...]) -> str:
    """Return an operator's identity, which is the same for its replicas and after a restart.

    Outside a cluster it has no ``namespace`` of its own, and the namespaces that it serves identify it.
    """
    where = namespace or ",".join(sorted(namespaces)) or "*"
    return f"{where}/{cluster}" if cluster else where


def other(job: Job, mine: str, now: dt.datetime) -> str:
    """Return the other operator that serves the job; empty if none does."""
    owner = Owner.of(job)
    return owner.identity if owner is not None and owner.identity != mine and owner.holds(now) else ""


def renewal(job: Job, mine: str, now: dt.datetime) -> str:
    """Return the annotation's new content; empty if it need not change."""
    owner = Owner.of(job)
    if owner is not None and owner.identity == mine and abs(now - owner.renewed) < RENEWED_AFTER:
        return ""
    return json.dumps({"uid": job.uid, "operator": mine, "renewed": timestamp(now)}, separators=(",", ":"))
