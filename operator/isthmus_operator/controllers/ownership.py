"""Which operator serves a job, where several could: an annotation names it, and is renewed while it does.

Two operators with different settings (a cluster-wide one and a namespace's own, or two names for one cluster) would
undo each other's work for ever, and submit a pool twice. Pure.
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
    """What the annotation says."""

    identity: str
    renewed: dt.datetime

    @classmethod
    def of(cls, job: Job) -> Self | None:
        """Read a job's; None where it has none, or a copied or damaged one."""
        try:
            content = json.loads(job.operator)
            renewed = parse_timestamp(content["renewed"])
            if content["uid"] != job.uid or renewed is None:
                return None
            return cls(str(content["operator"]), renewed)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def holds(self, now: dt.datetime) -> bool:
        """Return whether it was renewed lately. A moment that is yet to come is none."""
        return abs(now - self.renewed) < EXPIRES_AFTER


def identity(cluster: str, namespace: str, namespaces: tuple[str, ...]) -> str:
    """Return an operator's name for itself: alike for its replicas and after a restart. Outside of a cluster, where it
    has no ``namespace`` of its own, the namespaces that it serves tell it from others."""
    where = namespace or ",".join(sorted(namespaces)) or "*"
    return f"{where}/{cluster}" if cluster else where


def other(job: Job, mine: str, now: dt.datetime) -> str:
    """Return which other operator serves the job; empty where none does."""
    owner = Owner.of(job)
    return owner.identity if owner is not None and owner.identity != mine and owner.holds(now) else ""


def renewal(job: Job, mine: str, now: dt.datetime) -> str:
    """Return what the annotation shall say from now on; empty where it need not change."""
    owner = Owner.of(job)
    if owner is not None and owner.identity == mine and abs(now - owner.renewed) < RENEWED_AFTER:
        return ""
    return json.dumps({"uid": job.uid, "operator": mine, "renewed": timestamp(now)}, separators=(",", ":"))
