"""Secure aggregation in the manifest: its settings, and the jobs that it cannot protect."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator

from ..dp_skellam import grid_of
from ..secure_sums import FEWEST_CLIENTS, threshold
from .compression import HALVES, INTEGERS, NONE, TOP_K, Compression
from .fields import PATTERN_METRIC, Decimal, Resource, exactly, single_precision_problem
from .participation import Selection, Stragglers
from .strategy import Algorithm, Strategy

# Strategies that need sums of the clients' tensors and scalars, and nothing of a single client.
LINEAR: tuple[Algorithm, ...] = (
    "FedAvg", "FedProx", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedNova", "SCAFFOLD",
)  # fmt: skip
# The reasons against the others. A test checks that every algorithm is in one of the two tables.
NOT_LINEAR: Mapping[Algorithm, str] = {
    **dict.fromkeys(
        ("CoordinateMedian", "TrimmedMean", "Krum", "MultiKrum", "GeometricMedian"),
        "it compares single updates, and only their sum is opened",
    ),
    "QFedAvg": "it needs the loss of each client",
    "FedDyn": "it needs the drift of each client",
    **dict.fromkeys(("FedBuff", "FedAsync"), "the clients of its rounds are not known when the masks are made"),
    "Custom": "it may use single updates in any way",
}
DEFAULT_BOUNDS: Mapping[str, str] = {"loss": "100", "eval_loss": "100", "val_loss": "100", "accuracy": "1"}
"""Largest absolute value of metrics that are masked without further settings."""
FEWEST_STEPS = 1023
"""Minimum number of positive values of one coordinate of one client, after division of the ring by the clients."""
MOST_EXAMPLES_16 = 100_000
"""Largest maxExamples with bits 16. Above it, weights of typical clients would have no precision left."""
LARGEST_SUM = 2.0**43
"""Limit of a masked sum of scalars: 63 bits without sign, 20 of them for fractions."""


def ring_steps(bits: int, clients: int) -> int:
    """Return the largest quantised value of one client's coordinate for which a sum cannot wrap around."""
    return ((1 << (bits - 1)) - 1) // clients


def party_title(name: str) -> str:
    """Return the words for a party of :attr:`Cohort.parties`."""
    return f"site {name}" if name else "the cluster"


@dataclass(frozen=True)
class Cohort:
    """The clients of a job, as far as secure aggregation depends on them."""

    parties: Mapping[str, int]
    """Number of clients that train, by party: a site's name, or an empty string for all cloud pools."""
    fewest: int
    """Minimum number of clients that train."""
    most: int
    """Maximum number of clients that train."""
    selected: int
    """Expected number of updates of a round."""
    quorum: int
    """Number of clients with which a round starts."""
    observers: tuple[int, ...] = ()
    """Numbers of the pools that only evaluate."""


class SecureAggregation(Resource):
    """Secure aggregation (docs/secure-aggregation.md): clients mask their updates, and the aggregator sees their sum
    only. It needs at least 3 clients that train."""

    bits: Literal[32, 16] = 32
    """Size of a masked coordinate. 16 halves the traffic. It suits at most 32 clients, and needs maxExamples near the
    largest number of examples of a client."""
    clip: Decimal | None = None
    """Largest absolute change of one coordinate of the model in a round; larger ones are clipped, and counted. Default:
    derived from the last change of the global model (docs/secure-aggregation.md)."""
    max_examples: Annotated[int, Field(ge=1, le=1_000_000_000_000)] = 1_000_000
    """Largest number of training or evaluation examples of one client. It is public; the numbers are not."""
    metrics: Annotated[dict[str, Decimal], Field(max_length=64)] = dict(DEFAULT_BOUNDS)
    """Largest absolute values of the metrics that the script reports, by name. A metric without one stays at the
    clients. Those of loss, eval_loss, val_loss (100) and accuracy (1) hold unless others are given here."""
    min_parties: Annotated[int, Field(ge=1, le=64)] = 1
    """Minimum number of parties in a round. Each site is a party, and all cloud pools are one. With 1, clients are
    protected from a curious aggregator, not from the cluster's admin. A site's policy may demand more."""
    min_clients: Annotated[int, Field(ge=FEWEST_CLIENTS, le=100_000)] = FEWEST_CLIENTS
    """Minimum number of clients in an opened sum."""
    phase_deadline_seconds: Annotated[int, Field(ge=1, le=3600)] = 60
    """Time that clients have for one message of the protocol. A client that misses it is left out of the round."""
    rotation: bool = False
    """Rotate updates at random before they are rounded, for less error where few coordinates are much larger than the
    others."""
    keep: Decimal | None = None
    """Share of each tensor's coordinates that travel in a round, drawn in each round from a public seed (random-k):
    above 0, below 1. Default: all."""

    @field_validator("bits", mode="before")
    @classmethod
    def _is_no_bool(cls, bits: object) -> object:
        if isinstance(bits, bool):
            raise ValueError("must be 32 or 16")
        return bits

    @field_validator("clip")
    @classmethod
    def _is_size(cls, text: str | None) -> str | None:
        if text is None:
            return None
        if not (float(text) > 0 and math.isfinite(float(text))):
            raise ValueError(f"must be above 0 and finite, not {text}")
        if problem := single_precision_problem(text):
            raise ValueError(problem)
        return text

    @field_validator("metrics")
    @classmethod
    def _are_bounds(cls, bounds: dict[str, str]) -> dict[str, str]:
        for name, text in bounds.items():
            if len(name) > 64 or re.fullmatch(PATTERN_METRIC, name) is None:
                raise ValueError(f"{name[:80]!r} is no name of a metric: letters, digits, _ . and -")
            if not 1e-6 <= float(text) <= 1e9:
                raise ValueError(f"{name}: must be at least 1e-6 and at most 1e9, not {text}")
        return dict(DEFAULT_BOUNDS) | bounds

    @field_validator("keep")
    @classmethod
    def _is_share(cls, text: str | None) -> str | None:
        if text is not None and not 0 < float(text) < 1:
            raise ValueError(f"must be above 0 and below 1, not {text}; leave it out to send all coordinates")
        return text

    def problem(
        self,
        cohort: Cohort,
        strategy: Strategy,
        selection: Selection,
        stragglers: Stragglers,
        compression: Compression,
        metric: str,
    ) -> str | None:
        """Return the problem with a job, after the field's name, or ``None``. ``metric``: that of the objective."""
        return (
            self._rule_problem(strategy)
            or self._cohort_problem(cohort)
            or self._round_problem(cohort, selection, stragglers)
            or self._party_problem(cohort)
            or _codec_problem(compression)
            or self._range_problem(cohort.most)
            or self._metric_problem(metric)
        )

    def problem_with_noise(self, noise_multiplier: str, clients: int, contributors: int) -> str | None:
        """Return the problem with differential privacy beside it, after the field's name, or ``None``.

        ``contributors``: the fewest whose noise is enough; 0 if clients add none.
        """
        for field, used, why in (
            ("bits", self.bits == 16, "16 leaves no room for the noise; use 32"),
            ("rotation", self.rotation, "it would move coordinates past the bound of clipNorm; leave it out"),
            ("keep", self.keep is not None, "a part of an update is not clipped as the whole is; leave it out"),
        ):
            if used:
                return f"{_NAME}.{field}: does not go with privacy.differentialPrivacy: {why}"
        if contributors:
            try:
                steps = grid_of(self.bits, clients, float(noise_multiplier), contributors).steps
            except ValueError:
                steps = 0
            if steps < FEWEST_STEPS:
                return (
                    f"privacy.differentialPrivacy.noiseMultiplier: {noise_multiplier} is too much noise of {clients}"
                    f" clients for {self.bits} bits (privacy.secureAggregation); lower it, or use noise: Aggregator"
                )
        return None

    def summary(self, cohort: Cohort) -> list[str]:
        """Return lines about the clients that a round needs, the parties, and the people who are kept from updates."""
        clients = cohort.selected
        names = sorted(cohort.parties)
        foreign = min(max(cohort.parties.values()), clients - 1) if len(names) > 1 else 0
        least = max(threshold(clients, foreign), self.min_clients)
        if len(names) == 1:
            parties = f"all clients belong to one party, {party_title(names[0])}"
            scope = "it protects from a curious aggregator only, not from that party's admin"
        else:
            parties = f"parties: {', '.join(f'{party_title(name)} ({cohort.parties[name]})' for name in names)}"
            scope = (
                "it protects from a curious aggregator; if a site's policy demands two parties, also from the cluster's"
                " admin"
            )
        return [
            f"of {clients} clients in a round at least {least} must hand in; only their sum is opened",
            parties,
            scope,
        ]

    def _rule_problem(self, strategy: Strategy) -> str | None:
        algorithm = strategy.algorithm
        if algorithm not in LINEAR:
            reason = NOT_LINEAR.get(algorithm, "it is not known to need only sums")
            use = f"{', '.join(LINEAR[:-1])} or {LINEAR[-1]}"
            return f"strategy.algorithm: {algorithm} does not go with {_NAME}: {reason}; use {use}"
        if strategy.deterministic:
            return (
                f"strategy.deterministic: does not go with {_NAME}, whose sums of integers do not depend on the order,"
                " and whose rounding is random; leave it out"
            )
        if self.keep is not None and (why := strategy.against_sparse_updates):
            return f"{_NAME}.keep: does not go with {algorithm}, which {why}; leave it out"
        return None

    def _cohort_problem(self, cohort: Cohort) -> str | None:
        if cohort.observers:
            return (
                f"pools[{cohort.observers[0]}].role: Evaluate does not go with {_NAME}: these clients' metrics would"
                " travel in clear; leave the pool out, since the clients that train measure each model as well"
            )
        if cohort.fewest < FEWEST_CLIENTS:
            field = "replicas" if cohort.fewest == sum(cohort.parties.values()) else "replicas or cloud.minReplicas"
            return (
                f"pools: {_NAME} needs at least {FEWEST_CLIENTS} clients that train, and there may be only"
                f" {cohort.fewest}: with two, each could compute the other's update from the sum; raise {field}"
            )
        if cohort.fewest < self.min_clients:
            return (
                f"{_NAME}.minClients: {self.min_clients} is more than the {cohort.fewest} clients of all pools; no sum"
                " could be opened"
            )
        return None

    def _round_problem(self, cohort: Cohort, selection: Selection, stragglers: Stragglers) -> str | None:
        if selection.policy == "Adaptive":
            return (
                f"selection.policy: Adaptive does not go with {_NAME}: it uses the clients' losses, which stay secret;"
                " use All or Random"
            )
        if stragglers.late == "Fold":
            return (
                f"stragglers.late: Fold does not go with {_NAME}: a late update is masked for its own round; use"
                " Discard"
            )
        if cohort.quorum < self.min_clients:
            return (
                f"selection.minClients: {cohort.quorum} is too few for {_NAME}, which opens sums of at least"
                f" {self.min_clients} clients; raise it to {self.min_clients}, or leave it out"
            )
        least = max(threshold(cohort.quorum), self.min_clients)
        if stragglers.min_updates is not None and stragglers.min_updates < least:
            return (
                f"stragglers.minUpdates: {stragglers.min_updates} is too few for {_NAME}: of {cohort.quorum} clients"
                f" (selection.minClients), more than two thirds and at least {self.min_clients} must hand in; raise it"
                f" to {least}, or leave it out"
            )
        surplus = exactly(selection.over_select)
        asked = min(math.ceil(cohort.selected * (1 + surplus)), cohort.most)
        if surplus and threshold(asked) > cohort.selected:
            return (
                f"selection.overSelect: {selection.over_select} is too much for {_NAME}: of the {asked} clients of a"
                f" round {threshold(asked)} must hand in, and the round would end with {cohort.selected}; lower it"
            )
        return None

    def _party_problem(self, cohort: Cohort) -> str | None:
        parties, total = cohort.parties, sum(cohort.parties.values())
        if len(parties) < self.min_parties:
            which = ", ".join(party_title(name) for name in sorted(parties))
            return (
                f"{_NAME}.minParties: {self.min_parties} parties must take part, and the pools belong to"
                f" {len(parties)} ({which}); add pools of other sites, or lower it"
            )
        if self.min_parties > 1 and len(parties) == 2 and min(parties.values()) == 1:
            alone, other = sorted(parties, key=lambda name: parties[name])
            return (
                f"pools: {party_title(alone)} has one client beside {party_title(other)}, which could subtract its own"
                " updates from the sum, so that client would refuse; raise its replicas, or add another site"
            )
        largest = max(parties, key=lambda name: parties[name], default="")
        if len(parties) > 1 and parties[largest] >= threshold(total):
            return (
                f"pools: {parties[largest]} of {total} clients belong to {party_title(largest)}, whose shares"
                f" ({threshold(total)} suffice) could open the others' updates, so the others would refuse;"
                f" at most {threshold(total) - 1} of {total} may belong to one party"
            )
        return None

    def _range_problem(self, clients: int) -> str | None:
        steps = ring_steps(self.bits, clients)
        if steps < FEWEST_STEPS:
            most = ring_steps(self.bits, FEWEST_STEPS)
            way = "use 32" if self.bits == 16 else "use fewer"
            return f"{_NAME}.bits: {self.bits} is too small for {clients} clients, as it suits at most {most}; {way}"
        if self.bits == 16 and self.max_examples > MOST_EXAMPLES_16:
            return (
                f"{_NAME}.maxExamples: {self.max_examples} leaves no precision with bits 16: updates are scaled by"
                f" examples / maxExamples; give the largest number of examples of a client, at most {MOST_EXAMPLES_16},"
                " or use bits 32"
            )
        name, bound = max(self.metrics.items(), key=lambda item: float(item[1]))
        if self.max_examples * float(bound) * clients > LARGEST_SUM:
            most = int(LARGEST_SUM / float(bound) / clients)
            return (
                f"{_NAME}.maxExamples: {self.max_examples} examples of each of {clients} clients, times {bound} for"
                f" the metric {name}, exceed the range of masked sums; lower it to {most} or less, or the metric's"
                " bound"
            )
        return None

    def _metric_problem(self, metric: str) -> str | None:
        if metric in self.metrics:
            return None
        return (
            f"{_NAME}.metrics: has no bound for objective.metric, {metric}; add its largest absolute value, such as"
            f' {metric}: "1"'
        )


_NAME = "privacy.secureAggregation"


def _codec_problem(compression: Compression) -> str | None:
    codecs = compression.upload.split("+")
    if compression.upload == NONE:
        return None
    if TOP_K in codecs:
        why = f"the positions depend on the data and are sent in clear; use {_NAME}.keep, which draws them at random"
    elif used := [codec for codec in codecs if codec in INTEGERS]:
        why = f"the scales of {used[0]} depend on the data and are sent in clear; use {_NAME}.bits 16 or keep"
    elif used := [codec for codec in codecs if codec in HALVES]:
        why = f"masked updates are integers, which {used[0]} does not hold; use {_NAME}.bits 16 or keep"
    else:
        why = f"masked updates are random numbers, which no codec makes smaller; use {_NAME}.bits 16 or keep"
    return f"compression.upload: {compression.upload} does not go with {_NAME}: {why}"
