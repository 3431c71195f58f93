"""The actions of a plan, as data. :mod:`..effects.apply` carries them out in order; each one is idempotent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.pb import bridge_pb2

from ..state.job_record import ArrayKey


@dataclass(frozen=True)
class SaveJob:
    """Write the record, the finalizers and the scheme of names of the FederatedJob."""

    record: str | None = None
    finalizers: tuple[str, ...] | None = None
    names: str = ""  # the scheme of its objects' names


@dataclass(frozen=True)
class Apply:
    """Apply an object on the server's side."""

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
    """Copy a user's ConfigMap, so that all clients of a job get the same files if it changes later."""

    source: str
    name: str


@dataclass(frozen=True)
class CreateAuthority:
    """Create the job's CA."""

    secret: str
    days: int


@dataclass(frozen=True)
class RenewAuthority:
    """Renew the job's CA certificate with its existing key, so running pods are unaffected."""

    secret: str
    days: int


@dataclass(frozen=True)
class IssueCertificate:
    """Issue a certificate, or those of several clients, signed by the job's CA."""

    secret: str
    name: str
    days: int
    hosts: tuple[str, ...] = ()
    uris: tuple[str, ...] = ()
    clients: tuple[tuple[int, str], ...] = ()
    """Index and identity of each client; the Secret then holds a certificate and a key for each."""


@dataclass(frozen=True)
class CreatePod:
    """Create a pod, unless one of that name exists."""

    body: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])


@dataclass(frozen=True)
class DeletePod:
    """Delete the pod with that uid."""

    name: str
    uid: str


@dataclass(frozen=True)
class EnsurePool:
    """Request an array from the site's bridge."""

    array: ArrayKey
    site: str
    key: str
    secret: str  # the pool's certificate
    spec: bridge_pb2.PoolSpec  # without the certificate and the files
    code: str = ""  # the ConfigMap with the files


@dataclass(frozen=True)
class RenewCredentials:
    """Send a pool's renewed certificate to the site, for its running clients."""

    array: ArrayKey
    site: str
    key: str
    secret: str


@dataclass(frozen=True)
class CancelPool:
    """Cancel an array at its site."""

    array: ArrayKey
    site: str
    key: str
    reason: str


@dataclass(frozen=True)
class ShrinkPool:
    """Cancel an array's clients at its site, except for the first ``replicas``."""

    array: ArrayKey
    site: str
    key: str
    replicas: int


@dataclass(frozen=True)
class RecordOrphan:
    """Note on the HPCSite what is to be cancelled there once the site can be reached."""

    pool: str
    site: str
    key: str


@dataclass(frozen=True)
class DeleteJob:
    """Delete the FederatedJob, whose time to live is over."""


@dataclass(frozen=True)
class Emit:
    """Write a Kubernetes event."""

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
