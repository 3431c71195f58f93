"""The HPCSite: address of one site's bridge, and the namespaces that may use it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..identities import bridge_server_name
from .federated_job_status import Condition
from .fields import PATTERN_SIGNING_ROOT, Cidr, HostPort, Namespace, ObjectName, Resource, Text, list_map

HostName = Annotated[str, Field(max_length=253, pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$")]
NamespacePattern = Annotated[str, Field(max_length=63, pattern=r"^(\*|[a-z0-9]([-a-z0-9]*[a-z0-9])?)$")]


class SecretRef(Resource):
    """Reference to a Secret with ca.crt, tls.crt and tls.key."""

    name: ObjectName
    namespace: Namespace


class BridgeTls(Resource):
    """Mutual TLS with the bridge."""

    secret_ref: SecretRef
    """Secret with ca.crt (the site's CA), tls.crt and tls.key (this cluster's client certificate)."""
    server_name: HostName | None = None
    """The name in the bridge's certificate. Default: the endpoint's host; with DialOut NAME.bridge.isthmus.dev, where
    NAME is the HPCSite's."""


SigningRoot = Annotated[str, Field(max_length=64, pattern=PATTERN_SIGNING_ROOT)]


class HpcSiteSpec(Resource):
    """An HPC site, as the platform's admin describes it."""

    connection: Literal["DialIn", "DialOut"] = "DialIn"
    """Direction of the connection. DialIn: this cluster's operator dials the bridge. DialOut: the bridge dials this
    cluster's gateway, for sites that accept no inbound connection. Nothing else differs."""
    endpoint: HostPort | None = None
    """host:port of the site's bridge; with DialIn only."""
    tls: BridgeTls
    aggregator_access: Literal["Direct", "ViaBridge"] = "Direct"
    """Path of the site's compute nodes to the aggregators. Direct: they dial the aggregators' addresses. ViaBridge:
    they dial the bridge, which relays the end-to-end encrypted bytes (the site's policy must have a relay)."""
    allowed_namespaces: Annotated[list[NamespacePattern], Field(min_length=1, max_length=1000)]
    """Namespaces whose FederatedJobs may use the site; "*" allows all."""
    signing_root: SigningRoot | None = None
    """Public key of the site's root for secure aggregation, as its admin told you: 64 hexadecimal digits. Default: the
    one that its bridge reports."""
    client_cidrs: Annotated[list[Cidr], Field(min_length=1, max_length=64, alias="clientCIDRs")] = ["0.0.0.0/0", "::/0"]
    """Source addresses of the site's clients, for the aggregators' NetworkPolicies. Default: all. Behind a NodePort or
    a load balancer that rewrites addresses, they match only with expose.externalTrafficPolicy: Local."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.connection == "DialIn" and self.endpoint is None:
            raise ValueError("endpoint: is missing; without it the site's bridge must dial out (connection: DialOut)")
        if self.connection == "DialOut" and self.endpoint is not None:
            raise ValueError("endpoint: goes with connection DialIn; a bridge that dials out is not dialled")
        return self

    def bridge_name(self, site: str) -> str | None:
        """Return the name that the bridge's certificate must have; ``None`` means the endpoint's host."""
        if self.tls.server_name is None and self.connection == "DialOut":
            return bridge_server_name(site)
        return self.tls.server_name

    def allows(self, namespace: str) -> bool:
        """Return True if jobs of that namespace may use the site."""
        return "*" in self.allowed_namespaces or namespace in self.allowed_namespaces


class Orphan(Resource):
    """A pool whose job was deleted while its site was unreachable."""

    namespace: str
    job: str
    pool: str
    since: Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class SigningStatus(Resource):
    """Roots of secure aggregation. Each side's admin compares the other's with what they were told."""

    party: str = ""
    """Name of the site's party."""
    root: str = ""
    """Public key of the site's root, as its bridge reports it."""
    cluster_party: str = ""
    """Name of this cluster's party, for the site's policy."""
    cluster_root: str = ""
    """Public key of this cluster's root, for the site's policy."""


class HpcSiteStatus(Resource):
    """State of the site as last reported by its bridge."""

    observed_generation: int | None = None
    conditions: Annotated[list[Condition], Field(json_schema_extra=list_map("type"))] = []
    """Reachable, Ready, Reconciling and Stalled."""
    slurm_version: str | None = None
    cluster: str | None = None
    """Slurm's name of the cluster."""
    bridge_version: str | None = None
    partitions: list[str] = []
    environments: list[str] = []
    accounts: list[str] = []
    data_sets: list[str] = []
    signing: SigningStatus | None = None
    """Set if the site takes part in secure aggregation."""
    orphans: dict[str, Orphan] = {}
    """Pools that may still run here, by key. Their jobs were deleted while the site was unreachable. Each is cancelled
    as soon as the site answers, and is then removed from this list."""
    in_use: dict[str, str] = {}
    """Jobs with pools here: namespace/name, and the pools. An HPCSite with an entry here, or an orphan, has the
    finalizer isthmus.dev/cleanup, and stays when it is deleted."""
    message: Text | None = None
