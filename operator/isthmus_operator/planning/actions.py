"""The actions of a plan, as data. :mod:`..effects.apply` carries them out in order; each one is idempotent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.pb import bridge_pb2

from ..state.job_record import ArrayKey


@dataclass(frozen=True)
class SaveJob:
    """A write of the FederatedJob's record, finalizers and naming scheme."""

    record: str | None = None
    finalizers: tuple[str, ...] | None = None
    names: str = ""  # the scheme of its objects' names


@dataclass(frozen=True)
class Apply:
    """A server-side apply of an object."""

    body: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.body["kind"])

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])


@dataclass(frozen=True)
class Mend:
    """The restoration of an object that was edited."""

    body: Mapping[str, Any]  # the whole object, or a merge patch of its metadata
    fields: tuple[str, ...]
    reason: Reason | None = Reason.RESTORED  # of the event; None after a change of settings or version
    whole: bool = False

    @property
    def kind(self) -> str:
        return str(self.body["kind"])

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])


@dataclass(frozen=True)
class CopyCode:
    """A copy of a user's ConfigMap, so that all clients of a job get the same files if it changes later."""

    source: str
    name: str


@dataclass(frozen=True)
class CreateAuthority:
    """The creation of the job's CA."""

    secret: str
    days: int


@dataclass(frozen=True)
class RenewAuthority:
    """The renewal of the job's CA certificate with its existing key, which does not affect running pods."""

    secret: str
    days: int


@dataclass(frozen=True)
class IssueCertificate:
    """A certificate, or those of several clients, to be signed by the job's CA."""

    secret: str
    name: str
    days: int
    hosts: tuple[str, ...] = ()
    uris: tuple[str, ...] = ()
    clients: tuple[tuple[int, str], ...] = ()
    """Index and identity of each client; the Secret then holds a certificate and a key for each."""
    signing: "Signing | None" = None
    """With secure aggregation, for cloud clients."""


@dataclass(frozen=True)
class Signing:
    """The signing key, credential and trust file of a cloud pool's clients, beside their certificates."""

    job_uid: str
    pool: str
    trust: str  # the file's content; empty: not known now, and an existing one stays


@dataclass(frozen=True)
class CreatePod:
    """The creation of a pod, unless one of that name exists."""

    body: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])


@dataclass(frozen=True)
class DeletePod:
    """The deletion of the pod with that uid."""

    name: str
    uid: str


@dataclass(frozen=True)
class EnsurePool:
    """A request for an array to the site's bridge."""

    array: ArrayKey
    site: str
    key: str
    secret: str  # the pool's certificate
    spec: bridge_pb2.PoolSpec  # without the certificate and the files
    code: str = ""  # the ConfigMap with the files


@dataclass(frozen=True)
class RenewCredentials:
    """A renewed certificate for an array's running clients, to be sent to the site."""

    array: ArrayKey
    site: str
    key: str
    secret: str


@dataclass(frozen=True)
class CancelPool:
    """The cancellation of an array at its site."""

    array: ArrayKey
    site: str
    key: str
    reason: str


@dataclass(frozen=True)
class ShrinkPool:
    """The cancellation of an array's clients at its site, except for the first ``replicas``."""

    array: ArrayKey
    site: str
    key: str
    replicas: int


@dataclass(frozen=True)
class RecordOrphan:
    """A note on the HPCSite of an array that is to be cancelled there once the site can be reached."""

    pool: str
    site: str
    key: str


@dataclass(frozen=True)
class DeleteJob:
    """The deletion of the FederatedJob, whose time to live is over."""


@dataclass(frozen=True)
class Emit:
    """A Kubernetes event."""

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
    """The result of planning: actions, the new status, events, and when to reconcile again."""

    actions: tuple[Action, ...] = ()
    status: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[Emit, ...] = ()  # written after the status
    requeue: float = 600.0  # seconds
