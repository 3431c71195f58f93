"""Names of everything that the operator makes for a job: deterministic, so that a repeated step makes nothing twice."""

import hashlib
import re
from typing import Protocol

from isthmus_contracts import identities as ids

ANNOTATION_RECORD = f"{ids.GROUP}/record"  # on the FederatedJob: see state/job_record.py
ANNOTATION_NAMES = f"{ids.GROUP}/names"  # likewise: which of these functions' schemes its pools' objects have
# On a claim of an earlier job: the name of the job that is to adopt it; afterwards, the uid of that earlier job.
ANNOTATION_ADOPT = f"{ids.GROUP}/adopt"
ANNOTATION_ADOPTED = f"{ids.GROUP}/adopted-from"
ANNOTATION_OPERATOR = f"{ids.GROUP}/operator"  # likewise: see controllers/ownership.py
# On pods: which CA signed what they mount; on the Secret of a renewed CA: that, and its key.
ANNOTATION_AUTHORITY = f"{ids.GROUP}/authority"
ANNOTATION_RENDERED = f"{ids.GROUP}/rendered"  # on what is compared and mended: a hash of what was written
ROLE_AGGREGATOR = "aggregator"
ROLE_CLIENT = "client"
JOB_FILE = "job.json"
VOLUME_PREFIX = "isthmus-"  # of the volumes that the operator adds: templates cannot use it
CLIENTS_IN_SECRET = 400  # of some 1,100 bytes each
HASHED = "hashed"  # the value of ANNOTATION_NAMES
_HASH = 10  # hexadecimal digits


class Named(Protocol):
    """A job, as far as its names go."""

    @property
    def name(self) -> str:
        """Its own name."""

    @property
    def old_names(self) -> bool:
        """True if it was accepted before there were hashes in names: what it has keeps its name."""


def aggregator(job: str) -> str:
    """The aggregator's pod and Service."""
    return f"{job}-aggregator"


def job_file(job: str) -> str:
    """The ConfigMap that records the accepted job."""
    return f"{job}-job"


def clients_policy(job: str) -> str:
    """The NetworkPolicy of the clients' pods."""
    return f"{job}-clients"


def code(job: str) -> str:
    """The ConfigMap with the job's own copy of its files."""
    return f"{job}-code"


def checkpoints(job: str) -> str:
    """The aggregator's PersistentVolumeClaim."""
    return f"{job}-checkpoints"


def authority(job: str) -> str:
    """The Secret with the job's CA and its key; no pod mounts it."""
    return f"{job}-ca"


def aggregator_tls(job: str) -> str:
    """The Secret with the aggregator's certificate."""
    return f"{job}-aggregator-tls"


def observer_tls(job: str) -> str:
    """The Secret with the certificate with which the operator asks the aggregator."""
    return f"{job}-observer-tls"


def hashed(pool: str) -> bool:
    """Return whether the names of a pool's objects bear a hash.

    ``JOB-POOL`` tells job and pool apart by its last hyphen. A pool whose own name has one (job a and pool b-c, job a-b
    and pool c), or looks like a hash, needs more.
    """
    return "-" in pool or re.fullmatch(f"[0-9a-f]{{{_HASH}}}", pool) is not None


def of_pool(job: Named, pool: str) -> str:
    """Return how the names of a pool's objects begin: no two pools of a namespace share it."""
    plain = f"{job.name}-{pool}"
    if job.old_names or not hashed(pool):
        return plain
    return f"{plain}-{hashlib.sha256(f'{job.name}/{pool}'.encode()).hexdigest()[:_HASH]}"


def pool_tls(job: Named, pool: str) -> str:
    """The Secret with the certificate of an HPC pool's clients."""
    return f"{of_pool(job, pool)}-tls"


def clients_tls(job: Named, pool: str, index: int) -> str:
    """The Secret with the certificate of a cloud pool's client, and of some others: a Secret holds a megabyte."""
    number, secret = index // CLIENTS_IN_SECRET, pool_tls(job, pool)
    return f"{secret}-{number}" if number else secret


def client(job: Named, pool: str, index: int, attempt: int) -> str:
    """One start of one cloud client."""
    return f"{of_pool(job, pool)}-{index}-{attempt}"


def labels(job: str, job_uid: str) -> dict[str, str]:
    """Labels of every object of a job."""
    return {ids.LABEL_MANAGED_BY: ids.MANAGED_BY, ids.LABEL_JOB: job, ids.LABEL_JOB_UID: job_uid}
