"""Status of a FederatedJob, with its condition types and reasons."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from .fields import Resource, list_map

Phase = Literal["Pending", "Rejected", "Starting", "Running", "Suspended", "Complete", "Failed"]


class ConditionType(StrEnum):
    """Condition types of a FederatedJob. An HPCSite has REACHABLE and the last three."""

    ACCEPTED = "Accepted"  # the manifest is valid and its sites exist
    AGGREGATOR_READY = "AggregatorReady"
    QUORUM_REACHED = "QuorumReached"  # enough clients are connected for a round
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"
    SECURELY_AGGREGATED = "SecurelyAggregated"  # with secure aggregation: the newest sum could be opened
    REACHABLE = "Reachable"
    # Conditions that generic tools read (kstatus: Flux, Argo CD, Helm). Exactly one is True.
    READY = "Ready"  # the job is in the requested state: it trains, is complete, or is suspended
    RECONCILING = "Reconciling"
    STALLED = "Stalled"  # rejected or failed: it needs a user's action


class Reason(StrEnum):
    """Reasons of conditions and events."""

    VALID = "Valid"
    INVALID_SPEC = "InvalidSpec"
    TEMPLATE_NOT_ALLOWED = "TemplateNotAllowed"  # a pod template has fields that the platform's admin has not allowed
    SITE_NOT_FOUND = "SiteNotFound"
    SITE_NOT_ALLOWED = "SiteNotAllowed"
    SITE_UNREACHABLE = "SiteUnreachable"
    SITE_NOT_CONNECTED = "SiteNotConnected"  # it dials out, and its bridge is not connected to the gateway
    SITE_REACHABLE = "SiteReachable"
    CREDENTIALS_MISSING = "CredentialsMissing"
    SIGNING_ROOT_MISSING = "SigningRootMissing"  # secure aggregation: a party's root is not known
    POLICY_DENIED = "PolicyDenied"
    AGGREGATOR_STARTING = "AggregatorStarting"
    AGGREGATOR_RUNNING = "AggregatorRunning"
    AGGREGATOR_LOST = "AggregatorLost"
    AGGREGATOR_FAILED = "AggregatorFailed"
    AGGREGATOR_FINISHED = "AggregatorFinished"
    WAITING_FOR_CLIENTS = "WaitingForClients"
    ENOUGH_CLIENTS = "EnoughClients"
    SUSPENDED = "SuspendedByUser"
    NOT_SUSPENDED = "NotSuspended"
    TRAINING = "Training"
    PROGRESSING = "Progressing"
    ROUNDS_COMPLETED = "RoundsCompleted"
    TARGET_REACHED = "TargetReached"  # objective.target, before the last round
    NO_SUM_YET = "NoSumYet"  # secure aggregation: no round has ended
    SUM_OPENED = "SumOpened"
    INSTANCE_FAILED = "InstanceFailed"  # too few clients of a round handed in, or they refused: it is done again
    PRIVACY_BUDGET_SPENT = "PrivacyBudgetSpent"  # the next round would exceed maxEpsilon, before the last round
    QUORUM_IMPOSSIBLE = "QuorumImpossible"  # too many clients are out of restarts
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    QUEUE_TIMEOUT = "QueueTimeout"
    CLIENT_FAILED = "ClientFailed"
    CLIENTS_NOT_RUNNING = "ClientsNotRunning"  # pods of a pool do not start, or their command exits early
    TIME_LIMIT_REACHED = "TimeLimitReached"  # an HPC pool's, with rounds left: the next attempt follows
    PREEMPTED = "Preempted"  # nodes of an HPC pool were preempted or failed: the next attempt follows
    ADOPTED = "Adopted"  # an earlier job's claim, which somebody offered by an annotation
    RESTORED = "Restored"  # somebody deleted or edited an object that the operator made for the job


class Condition(Resource):
    """Condition, as metav1.Condition."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    last_transition_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    observed_generation: int | None = None


class RoundsStatus(Resource):
    """Progress in rounds."""

    current: int = 0
    completed: int = 0
    total: int = 0


class PoolStatus(Resource):
    """Clients of one pool."""

    name: str
    desired: int = 0
    queued: int = 0
    """Clients that have not started: pending pods, or tasks in the Slurm queue."""
    ready: int = 0
    """Clients that are connected to the aggregator."""
    failed: int = 0
    reason: str = ""
    """Reason for the wait in the queue, or the last failure."""
    jobs: list[str] = []
    """Slurm job ids."""
    attempt: int = 0
    """For HPC pools: number of resubmissions of the array."""


class MetricStatus(Resource):
    """Newest value of a metric, over the held-out data of all clients that evaluate."""

    name: str
    value: str
    round: int


class ModelStatus(Resource):
    """A committed global model. A large one appears a moment after its round, because its file is hashed in the
    background."""

    uri: str
    round: int
    sha256: str


class PrivacyStatus(Resource):
    """Guarantee of differential privacy for all committed models so far."""

    epsilon: str
    delta: str
    rounds: int = 0
    """Number of published rounds in the account."""


class ClientsStatus(Resource):
    """Clients over all pools."""

    ready: int = 0
    total: int = 0
    summary: str = ""
    """Text ready/total, for the table of kubectl get."""


class FederatedJobStatus(Resource):
    """State of the job as observed by the operator."""

    observed_generation: int | None = None
    phase: Phase | None = None
    """For display only; programs should read the conditions."""
    message: str | None = None
    """One line: what the job waits for, or why it failed."""
    conditions: Annotated[list[Condition], Field(json_schema_extra=list_map("type"))] = []
    rounds: RoundsStatus | None = None
    clients: ClientsStatus | None = None
    pools: Annotated[list[PoolStatus], Field(json_schema_extra=list_map("name"))] = []
    metrics: Annotated[list[MetricStatus], Field(json_schema_extra=list_map("name"))] = []
    best_metric: MetricStatus | None = None
    model: ModelStatus | None = None
    """The newest model. Once the job is complete, the model that it delivers: that of the round that met
    objective.target, or else that of the last round."""
    best_model: ModelStatus | None = None
    """The model with the value of bestMetric. It is kept besides the newest ones."""
    privacy: PrivacyStatus | None = None
    start_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})] | None = None
    completion_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})] | None = None
