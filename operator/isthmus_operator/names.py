"""Names of the objects that the operator creates for a job: deterministic, so that no step creates anything twice."""

import hashlib
import re
from typing import Protocol

from isthmus_contracts import identities as ids

ANNOTATION_RECORD = f"{ids.GROUP}/record"  # on the FederatedJob: see state/job_record.py
ANNOTATION_NAMES = f"{ids.GROUP}/names"  # on the FederatedJob: naming scheme of its pools' objects
# On the claim of an earlier job: name of the job that is to adopt it; afterwards, the uid of the earlier job.
ANNOTATION_ADOPT = f"{ids.GROUP}/adopt"
ANNOTATION_ADOPTED = f"{ids.GROUP}/adopted-from"
ANNOTATION_OPERATOR = f"{ids.GROUP}/operator"  # on the FederatedJob: see controllers/ownership.py
# On pods: fingerprint of the CA that signed their certificate. On a renewed CA's Secret: fingerprint and key id.
ANNOTATION_AUTHORITY = f"{ids.GROUP}/authority"
ANNOTATION_RENDERED = f"{ids.GROUP}/rendered"  # on objects that are compared and restored: hash of what was applied
ROLE_AGGREGATOR = "aggregator"
ROLE_CLIENT = "client"
JOB_FILE = "job.json"
VOLUME_PREFIX = "isthmus-"  # of the volumes that the operator adds: templates cannot use it
CLIENTS_IN_SECRET = 400  # of some 1,100 bytes each
HASHED = "hashed"  # the value of ANNOTATION_NAMES
_HASH = 10  # hexadecimal digits


class Named(Protocol):
    """The part of a job that its objects' names depend on."""

    @property
    def name(self) -> str:
        """The job's own name."""

    @property
    def old_names(self) -> bool:
        """True if it was accepted before names had hashes: its objects keep their names."""


def aggregator(job: str) -> str:
    """Return the name of the aggregator's pod and Service."""
    return f"{job}-aggregator"


def job_file(job: str) -> str:
    """Return the name of the ConfigMap that records the accepted job."""
    return f"{job}-job"


def clients_policy(job: str) -> str:
    """Return the name of the client pods' NetworkPolicy."""
    return f"{job}-clients"


def code(job: str) -> str:
    """Return the name of the ConfigMap with the job's own copy of its files."""
    return f"{job}-code"


def checkpoints(job: str) -> str:
    """Return the name of the aggregator's PersistentVolumeClaim."""
    return f"{job}-checkpoints"


def authority(job: str) -> str:
    """Return the name of the Secret with the job's CA and its key; no pod mounts it."""
    return f"{job}-ca"


def aggregator_tls(job: str) -> str:
    """Return the name of the Secret with the aggregator's certificate."""
    return f"{job}-aggregator-tls"


def observer_tls(job: str) -> str:
    """Return the name of the Secret with the operator's certificate for calls to the aggregator."""
    return f"{job}-observer-tls"


def hashed(pool: str) -> bool:
    """Return True if the names of a pool's objects contain a hash.

    ``JOB-POOL`` is ambiguous if the pool's name has a hyphen (job a and pool b-c, job a-b and pool c) or looks like
    a hash.
    """
    return "-" in pool or re.fullmatch(f"[0-9a-f]{{{_HASH}}}", pool) is not None


def of_pool(job: Named, pool: str) -> str:
    """Return the prefix of the names of a pool's objects, which is unique in its namespace."""
    plain = f"{job.name}-{pool}"
    if job.old_names or not hashed(pool):
        return plain
    return f"{plain}-{hashlib.sha256(f'{job.name}/{pool}'.encode()).hexdigest()[:_HASH]}"


def pool_tls(job: Named, pool: str) -> str:
    """Return the name of the Secret with the certificate of an HPC pool's clients."""
    return f"{of_pool(job, pool)}-tls"


def clients_tls(job: Named, pool: str, index: int) -> str:
    """Return the name of the Secret with a cloud client's certificate. It holds those of up to 400 clients (1 MB)."""
    number, secret = index // CLIENTS_IN_SECRET, pool_tls(job, pool)
    return f"{secret}-{number}" if number else secret


def client(job: Named, pool: str, index: int, attempt: int) -> str:
    """Return the pod name of one attempt of a cloud client."""
    return f"{of_pool(job, pool)}-{index}-{attempt}"


def labels(job: str, job_uid: str) -> dict[str, str]:
    """Return the labels of every object of a job."""
    return {ids.LABEL_MANAGED_BY: ids.MANAGED_BY, ids.LABEL_JOB: job, ids.LABEL_JOB_UID: job_uid}
