"""Names of everything that the operator makes for a job: deterministic, so that a repeated step makes nothing twice."""

from isthmus_contracts import identities as ids

ANNOTATION_RECORD = f"{ids.GROUP}/record"  # on the FederatedJob: see state/job_record.py
ANNOTATION_OPERATOR = f"{ids.GROUP}/operator"  # likewise: see controllers/ownership.py
# On pods: which CA signed what they mount; on the Secret of a renewed CA: that, and its key.
ANNOTATION_AUTHORITY = f"{ids.GROUP}/authority"
ANNOTATION_RENDERED = f"{ids.GROUP}/rendered"  # on NetworkPolicies: a hash of what we wrote
ROLE_AGGREGATOR = "aggregator"
ROLE_CLIENT = "client"
JOB_FILE = "job.json"
VOLUME_PREFIX = "isthmus-"  # of the volumes that the operator adds: templates cannot use it
CLIENTS_IN_SECRET = 400  # of some 1,100 bytes each


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


def pool_tls(job: str, pool: str) -> str:
    """The Secret with the certificate of an HPC pool's clients."""
    return f"{job}-{pool}-tls"


def clients_tls(job: str, pool: str, index: int) -> str:
    """The Secret with the certificate of a cloud pool's client, and of some others: a Secret holds a megabyte."""
    number = index // CLIENTS_IN_SECRET
    return f"{pool_tls(job, pool)}-{number}" if number else pool_tls(job, pool)


def client(job: str, pool: str, index: int, attempt: int) -> str:
    """One start of one cloud client."""
    return f"{job}-{pool}-{index}-{attempt}"


def labels(job: str, job_uid: str) -> dict[str, str]:
    """Labels of every object of a job."""
    return {ids.LABEL_MANAGED_BY: ids.MANAGED_BY, ids.LABEL_JOB: job, ids.LABEL_JOB_UID: job_uid}
