"""Specification of a FederatedJob. The CRD is generated from it; ``manifests`` turns its errors into one line."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..identities import RESERVED_POOL_NAMES
from ..secure_sums import threshold
from .aggregator import Aggregator
from .compression import TOP_K, Compression
from .fields import (
    PATTERN_METRIC,
    Decimal,
    DnsLabel,
    ObjectName,
    PodTemplate,
    Resource,
    SlurmAccount,
    SlurmName,
    exactly,
    list_map,
)
from .participation import Selection, Stragglers
from .privacy import Privacy
from .secure_aggregation import Cohort
from .strategy import Strategy
from .task import Task
from .tracking import Tracking


class Objective(Resource):
    """The metric that compares models. status.bestMetric follows it, and the best model is kept."""

    metric: Annotated[str, Field(pattern=PATTERN_METRIC, max_length=64)] = "accuracy"
    """Name of the metric, as the script's evaluation function returns it."""
    goal: Literal["Maximize", "Minimize"] = "Maximize"
    """Maximize if larger values are better, Minimize if smaller ones are."""
    target: Decimal | None = None
    """The job is complete as soon as a round's model has this value, and delivers that model. More than half of the
    clients that were asked must measure it, with one vote each, whatever their weights. Default: run all rounds."""


class CloudPool(Resource):
    """Clients that run as pods of this cluster."""

    template: PodTemplate = {}
    """Pod template overrides: resources, nodeSelector, tolerations, volumes. The container is named client."""

    min_replicas: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """Number of clients that remain once every client of the HPC pools is connected. Default: replicas."""
    max_replicas: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Number that the pool may grow to, by one for each HPC client that waits in a queue. Default: replicas."""


class SiteRef(Resource):
    """Reference to an HPCSite."""

    name: ObjectName


class GenericResource(Resource):
    """A generic resource (GRES) of a Slurm job, per task."""

    name: SlurmName
    type: SlurmName | None = None
    count: Annotated[int, Field(ge=1, le=1024)] = 1


class HpcResources(Resource):
    """Resources of one client of an HPC pool."""

    cpus_per_task: Annotated[int, Field(ge=1, le=4096)] = 1
    """CPUs of one client."""
    memory_mib: Annotated[int, Field(ge=1, le=64 * 1024 * 1024, alias="memoryMiB")] = 1024
    """Memory of one client."""
    gres: Annotated[list[GenericResource], Field(max_length=16, json_schema_extra=list_map("name"))] = []
    """Generic resources of one client, such as gpu."""


class HpcPool(Resource):
    """Clients that run as the tasks of one Slurm job array."""

    site_ref: SiteRef
    """The HPCSite, created by the platform's admin."""
    partition: SlurmName | None = None
    """Slurm partition. Default: the site's default partition."""
    account: SlurmAccount | None = None
    """Slurm account to charge. Default: the account that the site's policy assigns to the caller."""
    qos: SlurmName | None = None
    time_limit_seconds: Annotated[int, Field(ge=60, le=365 * 86400)] = 3600
    """Time limit of each job."""
    resources: HpcResources = HpcResources()
    clients_per_job: Annotated[int, Field(ge=1, le=256)] = 1
    """Number of clients that share a Slurm job and its node. The job requests that multiple of the resources. If the
    number of clients is no multiple of it, the last job starts fewer."""
    environment: DnsLabel
    """Name of an environment in the site's policy, never a path or a script."""
    data_ref: DnsLabel | None = None
    """Name of a data set in the site's policy. The script finds its path in ISTHMUS_DATA."""
    max_queue_seconds: Annotated[int, Field(ge=60, le=365 * 86400)] = 86400
    """Longest wait in the queue, in seconds. Afterwards the pool counts as failed."""
    max_replicas: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Largest value that replicas may have while the job runs. Changes of replicas do not affect the other clients.
    Clients are numbered as if there were this many. Default: replicas."""


class Pool(Resource):
    """A group of equal clients. Exactly one of cloud and hpc says where they run."""

    name: Annotated[DnsLabel, Field(max_length=32)]
    replicas: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Number of clients. For an HPC pool it may change while the job runs, up to hpc.maxReplicas."""
    role: Literal["Train", "Evaluate"] = "Train"
    """Evaluate: the clients only measure each new global model with the script's evaluation function, and do not
    train."""
    cloud: CloudPool | None = None
    hpc: HpcPool | None = None

    @property
    def size(self) -> int:
        """Maximum number of clients of the pool, by which its clients are numbered."""
        world = self.cloud or self.hpc
        most = world.max_replicas if world is not None else None
        return self.replicas if most is None else most

    @property
    def fewest(self) -> int:
        """Minimum number of clients of the pool, barring failures."""
        least = self.cloud.min_replicas if self.cloud is not None else None
        return self.replicas if least is None else least

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name in RESERVED_POOL_NAMES:
            raise ValueError(f"{name!r} is reserved")
        return name

    @model_validator(mode="after")
    def _one_world(self) -> Self:
        if (self.cloud is None) == (self.hpc is None):
            has = "has neither cloud nor hpc" if self.cloud is None else "has both cloud and hpc"
            raise ValueError(f"pool {self.name!r} {has}; give exactly one of them")
        return self


class FederatedJobSpec(Resource):
    """One training run over the clients of one or more pools."""

    suspend: bool = False
    """Stop the clients and the aggregator. The checkpoints stay, and training resumes from them."""
    rounds: Annotated[int, Field(ge=1, le=1_000_000)]
    """Number of rounds."""
    task: Task
    strategy: Strategy = Strategy()
    selection: Selection = Selection()
    stragglers: Stragglers = Stragglers()
    compression: Compression = Compression()
    privacy: Privacy = Privacy()
    objective: Objective = Objective()
    tracking: Tracking = Tracking()
    aggregator: Aggregator = Aggregator()
    pools: Annotated[list[Pool], Field(min_length=1, max_length=64, json_schema_extra=list_map("name"))]
    """Groups of clients, and where they run."""
    backoff_limit: Annotated[int, Field(ge=0, le=1000)] = 3
    """Number of restarts of each client (in HPC pools: of the array) after failures of its own."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=10 * 365 * 86400)] | None = None
    """The job fails if it is not complete within this time, in seconds."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=10 * 365 * 86400)] | None = None
    """The job is deleted this time after it completed or failed, in seconds. Default: never."""

    @property
    def total_clients(self) -> int:
        """Number of clients over all pools."""
        return sum(pool.size for pool in self.pools)

    @property
    def fewest_trainers(self) -> int:
        """Minimum number of clients that train."""
        return sum(pool.fewest for pool in self.pools if pool.role == "Train")

    @property
    def most_trainers(self) -> int:
        """Number of clients that train when cloud pools have grown to their maximum."""
        return sum(pool.size for pool in self.pools if pool.role == "Train")

    @property
    def expected_updates(self) -> int:
        """Expected number of updates per round, from the manifest alone."""
        replicas = sum(pool.replicas for pool in self.pools if pool.role == "Train")
        if self.selection.policy == "All":
            return replicas
        return min(max(math.ceil(exactly(self.selection.fraction) * replicas), self.min_clients), replicas)

    @property
    def min_clients(self) -> int:
        """Effective quorum."""
        secure = self.privacy.secure_aggregation
        least = secure.min_clients if secure is not None else 2
        if self._clients_add_noise:
            # The fewer may contribute, the more noise each adds. Two thirds of a round's clients are a compromise.
            replicas = sum(pool.replicas for pool in self.pools if pool.role == "Train")
            share = exactly(self.selection.fraction) if self.selection.policy != "All" else 1
            least = max(least, threshold(math.ceil(share * replicas)))
        return self.selection.min_clients or min(least, self.fewest_trainers)

    @property
    def min_updates(self) -> int:
        """Effective minimum number of updates of a round."""
        return self.stragglers.min_updates or min(self.min_clients, self.strategy.round_size or self.min_clients)

    @property
    def clients_noise_multiplier(self) -> float | None:
        """Multiplier of the noise that clients add, which they demand in each round; ``None`` if they add none."""
        private = self.privacy.differential_privacy
        return float(private.noise_multiplier) if private is not None and private.distributed else None

    @property
    def noise_contributors(self) -> int:
        """Number of clients whose noise is enough for differential privacy: the least of an opened sum. 0 if the
        aggregator adds the noise."""
        secure = self.privacy.secure_aggregation
        if secure is None or not self._clients_add_noise:
            return 0
        return max(self.min_updates, secure.min_clients)

    @property
    def _clients_add_noise(self) -> bool:
        private = self.privacy.differential_privacy
        return private is not None and private.distributed

    @property
    def folds_late(self) -> bool:
        """True if an update that arrives after its round counts in a later one."""
        return self.stragglers.late == "Fold" or self.strategy.round_size is not None

    @property
    def checkpoints_kept(self) -> int:
        """Number of newest checkpoints to keep, including the base models of late updates."""
        keep = self.aggregator.checkpoint.keep
        return max(keep, self.stragglers.max_staleness + 1) if self.folds_late else keep

    def pool(self, name: str) -> Pool:
        """Return the pool of that name. Raises ``KeyError``."""
        for pool in self.pools:
            if pool.name == name:
                return pool
        raise KeyError(name)

    def first_client(self, name: str) -> int:
        """Return the job-wide number of the named pool's client 0. Raises ``KeyError``.

        Clients that train are counted from 0, and so are those that only evaluate. Partitions of the training data use
        these numbers.
        """
        role, first = self.pool(name).role, 0
        for pool in self.pools:
            if pool.name == name:
                break
            first += pool.size if pool.role == role else 0
        return first

    def clients_beside(self, name: str) -> int:
        """Return the number of clients over all pools of the named pool's role. Raises ``KeyError``."""
        role = self.pool(name).role
        return sum(pool.size for pool in self.pools if pool.role == role)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [pool.name for pool in self.pools]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(f"pools[{number}].name: {name!r} is taken; each pool needs its own name")
        self._check_bursts()
        for number, pool in enumerate(self.pools):
            if pool.hpc is not None and pool.replicas > pool.size:
                raise ValueError(f"pools[{number}].replicas: {pool.replicas} is more than hpc.maxReplicas, {pool.size}")
        if not self.fewest_trainers:
            raise ValueError("pools: all of them have the role Evaluate; at least one must train")
        for field, number, never in (
            ("selection.minClients", self.min_clients, "it could never start"),
            ("stragglers.minUpdates", self.min_updates, "no round could end"),
        ):
            if number > self.fewest_trainers:
                which = "all pools" if all(pool.role == "Train" for pool in self.pools) else "all pools that train"
                raise ValueError(
                    f"{field}: {number} is more than the {self.fewest_trainers} clients of {which}; {never}"
                )
        self._check_privacy()
        if self.min_updates < self.strategy.fewest_updates:
            raise ValueError(
                f"stragglers.minUpdates: {self.min_updates} is too few for {self.strategy.algorithm}, which needs"
                f" {self.strategy.fewest_updates} updates (2 byzantine + 3) to tell the wrong ones"
            )
        size = self.strategy.round_size
        if size is not None and self.min_updates > size:
            raise ValueError(
                f"stragglers.minUpdates: {self.min_updates} is more than the {size} with which a round of"
                f" {self.strategy.algorithm} ends"
            )
        if self.folds_late and self.strategy.one_update_per_client:
            raise ValueError(
                f"stragglers.late: Fold does not go with {self.strategy.algorithm}, which counts one update per"
                " client in a round"
            )
        if self.strategy.deterministic and (by_time := self._decided_by_time()):
            raise ValueError(
                f"strategy.deterministic: which updates a round gets must not depend on speed, as {by_time} has it"
            )
        if TOP_K in self.compression.upload.split("+") and (why := self.strategy.against_sparse_updates):
            raise ValueError(
                f"compression.upload: TopK does not go with {self.strategy.algorithm}, which {why}; use Int8 or"
                " Rotation+Int4, or another algorithm"
            )
        return self

    @property
    def parties(self) -> dict[str, int]:
        """Number of clients that train, by party of secure aggregation: a site's name, or an empty string for all cloud
        pools."""
        parties: dict[str, int] = {}
        for pool in self.pools:
            if pool.role == "Train":
                party = pool.hpc.site_ref.name if pool.hpc is not None else ""
                parties[party] = parties.get(party, 0) + pool.replicas
        return parties

    @property
    def cohort(self) -> Cohort:
        """The clients, as far as secure aggregation depends on them."""
        observers = tuple(number for number, pool in enumerate(self.pools) if pool.role == "Evaluate")
        return Cohort(
            self.parties, self.fewest_trainers, self.most_trainers, self.expected_updates, self.min_clients, observers
        )

    def _check_privacy(self) -> None:
        if (secure := self.privacy.secure_aggregation) is not None and (
            problem := secure.problem(
                self.cohort, self.strategy, self.selection, self.stragglers, self.compression, self.objective.metric
            )
        ):
            raise ValueError(problem)
        private = self.privacy.differential_privacy
        if private is None:
            return
        if problem := private.problem(self.strategy.algorithm, self.most_trainers):
            raise ValueError(f"privacy.{problem}")
        if secure is not None and (
            problem := secure.problem_with_noise(private.noise_multiplier, self.most_trainers, self.noise_contributors)
        ):
            raise ValueError(problem)
        if self.strategy.deterministic:
            raise ValueError(
                "strategy.deterministic: does not go with privacy.differentialPrivacy, whose noise must be random"
            )
        if by_time := self._decided_by_time():
            raise ValueError(
                f"privacy.differentialPrivacy: does not go with {by_time}: one client's data must not decide whose"
                " updates count, or how often"
            )

    def _check_bursts(self) -> None:
        for number, pool in enumerate(self.pools):
            if pool.cloud is None or (pool.cloud.min_replicas is None and pool.cloud.max_replicas is None):
                continue
            path = f"pools[{number}].cloud"
            if all(other.hpc is None for other in self.pools):
                field = "maxReplicas" if pool.cloud.max_replicas is not None else "minReplicas"
                raise ValueError(f"{path}.{field}: there is no HPC pool whose queue it could follow")
            if not pool.fewest <= pool.replicas <= pool.size:
                raise ValueError(
                    f"{path}: minReplicas, replicas ({pool.replicas}) and maxReplicas must rise in this order"
                )

    def _decided_by_time(self) -> str | None:
        """Return the first setting, if any, that makes the set of counted updates depend on timing."""
        if self.strategy.round_size is not None:
            return f"strategy.algorithm {self.strategy.algorithm}"
        if self.selection.policy == "Adaptive":
            return "selection.policy Adaptive"
        if float(self.selection.over_select):
            return "selection.overSelect"
        return "stragglers.late Fold" if self.folds_late else None
