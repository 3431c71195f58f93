"""What a plan may ask for. Each action is data; effects/ carries it out, in order, and repeating one does no harm."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.pb import bridge_pb2


@dataclass(frozen=True)
class SaveJob:
    """Writes the record, the finalizers and the scheme of names of the FederatedJob itself."""

    record: str | None = None
    finalizers: tuple[str, ...] | None = None
    names: str = ""  # the scheme of its objects' names


@dataclass(frozen=True)
class Apply:
    """Server-side apply of a Service, ConfigMap or PersistentVolumeClaim."""

    body: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.body["kind"])

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])


@dataclass(frozen=True)
class Mend:
    """Puts back what somebody edited in an object."""

    body: Mapping[str, Any]  # the whole object, or a merge patch of its metadata
    fields: tuple[str, ...]
    reason: Reason | None = Reason.RESTORED  # of the event; None: only other settings, or another version, made it so
    whole: bool = False

    @property
    def kind(self) -> str:
        return str(self.body["kind"])

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])


@dataclass(frozen=True)
class CopyCode:
    """Copies a user's ConfigMap, so that every client of a job gets the same files whatever becomes of it."""

    source: str
    name: str


@dataclass(frozen=True)
class CreateAuthority:
    """Makes the job's CA."""

    secret: str
    days: int


@dataclass(frozen=True)
class RenewAuthority:
    """Prolongs the job's CA, with the key that it has: what runs notices nothing."""

    secret: str
    days: int


@dataclass(frozen=True)
class IssueCertificate:
    """Has the job's CA sign a certificate, or those of several clients."""

    secret: str
    name: str
    days: int
    hosts: tuple[str, ...] = ()
    uris: tuple[str, ...] = ()
    clients: tuple[tuple[int, str], ...] = ()
    """Each client's index and identity; the Secret then holds a certificate and a key for each."""


@dataclass(frozen=True)
class CreatePod:
    """Makes a pod; one of that name that exists is left alone."""

    body: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])


@dataclass(frozen=True)
class DeletePod:
    """Deletes exactly that pod."""

    name: str
    uid: str


@dataclass(frozen=True)
class EnsurePool:
    """Has the site run a pool, or a part of it."""

    pool: str  # or the part
    site: str
    key: str
    secret: str  # with the pool's certificate
    spec: bridge_pb2.PoolSpec  # without the certificate and the files
    code: str = ""  # the ConfigMap with the files


@dataclass(frozen=True)
class RenewCredentials:
    """Has the site hand a pool's renewed certificate to its clients."""

    pool: str  # or the part
    site: str
    key: str
    secret: str


@dataclass(frozen=True)
class CancelPool:
    """Has the site end a pool."""

    pool: str
    site: str
    key: str
    reason: str


@dataclass(frozen=True)
class ShrinkPool:
    """Has the site end the clients of a pool from an index on."""

    pool: str
    site: str
    key: str
    replicas: int


@dataclass(frozen=True)
class RecordOrphan:
    """Notes at the HPCSite what is still to be cancelled there once the site answers."""

    pool: str
    site: str
    key: str


@dataclass(frozen=True)
class DeleteJob:
    """Deletes the FederatedJob (its time to live is over)."""


@dataclass(frozen=True)
class Emit:
    """Writes a Kubernetes event."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


Action = (
    SaveJob
    | Apply
    | Mend
    | CopyCode
    | CreateAuthority
    | RenewAuthority
    | IssueCertificate
    | CreatePod
    | DeletePod
    | EnsurePool
    | RenewCredentials
    | CancelPool
    | ShrinkPool
    | RecordOrphan
    | DeleteJob
)


@dataclass(frozen=True)
class Plan:
    """What to do now, what to show, and when to look again."""

    actions: tuple[Action, ...] = ()
    status: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[Emit, ...] = ()  # once the actions and the status are through
    requeue: float = 600.0  # seconds
