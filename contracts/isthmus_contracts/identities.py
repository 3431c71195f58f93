"""Names shared by several parts: labels, environment variables, certificate identities, file names."""

import hashlib

GROUP = "isthmus.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

# Labels and finalizer of all objects that the operator creates.
LABEL_JOB = f"{GROUP}/job"
LABEL_JOB_UID = f"{GROUP}/job-uid"
LABEL_ROLE = f"{GROUP}/role"  # aggregator | client
LABEL_POOL = f"{GROUP}/pool"
LABEL_INDEX = f"{GROUP}/index"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY = "isthmus-operator"
# Request to the operator for the end of a Slurm task's log, as JSON: id, pool, index, lines. The answer is in a
# ConfigMap.
ANNOTATION_LOG_REQUEST = f"{GROUP}/log-request"
# Label of Kueue, copied to the pods, which Kueue then admits.
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
FINALIZER = f"{GROUP}/cleanup"

# A training script's environment inside a federation. A client without ENV_ENDPOINT runs alone.
RESERVED_ENV_PREFIX = "ISTHMUS_"
ENV_ENDPOINT = "ISTHMUS_ENDPOINT"  # host:port of the aggregator
ENV_SERVER_NAME = "ISTHMUS_SERVER_NAME"  # the name in the aggregator's certificate
ENV_TLS_DIR = "ISTHMUS_TLS_DIR"  # directory with CA_FILE, CERTIFICATE_FILE, KEY_FILE
ENV_JOB_UID = "ISTHMUS_JOB_UID"
ENV_JOB = "ISTHMUS_JOB"  # namespace/name
ENV_POOL = "ISTHMUS_POOL"
ENV_INDEX = "ISTHMUS_INDEX"  # within the pool, from 0
ENV_POOL_SIZE = "ISTHMUS_POOL_SIZE"
ENV_CLIENT = "ISTHMUS_CLIENT"  # within the job, from 0, among clients of its role
ENV_CLIENTS = "ISTHMUS_CLIENTS"  # number of clients of its role in the job
ENV_ATTEMPT = "ISTHMUS_ATTEMPT"  # increases with every start by the scheduler
ENV_STEP = "ISTHMUS_STEP"  # Slurm step of the client; empty if the batch script starts it
ENV_SCRATCH = "ISTHMUS_SCRATCH"  # a directory that survives a restart of the client, if there is one
ENV_DATA = "ISTHMUS_DATA"  # path of the pool's data set, if it has one
ENV_AUDIT_DIR = "ISTHMUS_AUDIT_DIR"  # directory of AUDIT_FILE, if the site keeps an audit log

# Files of a TLS directory: the keys of a kubernetes.io/tls Secret.
CA_FILE = "ca.crt"
CERTIFICATE_FILE = "tls.crt"
KEY_FILE = "tls.key"

# Files beside them for secure aggregation (wire/parties.py).
SIGNING_KEY_FILE = "signing.key"
CREDENTIAL_FILE = "credential.json"
TRUST_FILE = "trust.json"
PARTY_FILES = (SIGNING_KEY_FILE, CREDENTIAL_FILE, TRUST_FILE)

# Lines (JSON) of a client about each message with results that it sends; the site's bridge collects them.
AUDIT_FILE = "audit.jsonl"

# Secrets are named after their pools; these names are used for the aggregator and its observer.
RESERVED_POOL_NAMES = frozenset({"aggregator", "observer"})

AGGREGATOR_PORT = 7443
METRICS_PORT = 9090
BRIDGE_PORT = 7444
GATEWAY_PORT = 7446


def log_answer(job: str) -> str:
    """Return the name of the ConfigMap in which the operator answers :data:`ANNOTATION_LOG_REQUEST`."""
    return f"{job}-log"


def aggregator_server_name(job_uid: str) -> str:
    """Return the DNS name in the certificate of a job's aggregator. Clients verify it at every address."""
    return f"{job_uid}.aggregator.{GROUP}"


def pool_identity(job_uid: str, pool: str) -> str:
    """Return the URI (certificate SAN) of all clients of an HPC pool.

    They share one, since they run as one user and could read each other's keys.
    """
    return f"isthmus://job/{job_uid}/pool/{pool}"


def client_identity(job_uid: str, pool: str, index: int) -> str:
    """Return the URI (certificate SAN) of one client of a cloud pool. ``index``: within the pool, from 0."""
    return f"{pool_identity(job_uid, pool)}/client/{index}"


def client_files(index: int) -> tuple[str, str]:
    """Return the names of a client's certificate and key in a Secret with those of several clients."""
    return f"{index}.crt", f"{index}.key"


def observer_identity(job_uid: str) -> str:
    """Return the URI of the observer of a job's aggregator: the operator or the local runner."""
    return f"isthmus://job/{job_uid}/observer"


def operator_identity(cluster: str) -> str:
    """Return the URI that a cluster's operator presents to bridges; sites list it in their policies."""
    return f"isthmus://operator/{cluster}"


def bridge_server_name(site: str) -> str:
    """Return the DNS name in the certificate of a bridge that dials out, which has no address to verify."""
    return f"{site}.bridge.{GROUP}"


def pool_key(cluster: str, job_uid: str, pool: str, generation: int, attempt: int) -> str:
    """Return the exactly-once key of one attempt of a pool at a site: 32 lower-case hexadecimal digits."""
    text = "\x00".join((cluster, job_uid, pool, str(generation), str(attempt)))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def slurm_job_name(key: str) -> str:
    """Return the Slurm name of a pool's job array, by which the bridge finds it again."""
    return f"isthmus-{key}"
