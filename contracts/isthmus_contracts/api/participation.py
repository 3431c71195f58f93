"""Who takes part in a round, and what becomes of those that are slow."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from .fields import Decimal, Resource

SelectionPolicy = Literal["All", "Random", "Adaptive"]


def _between(text: str, at_least: float, at_most: float) -> str:
    if not at_least <= float(text) <= at_most:
        raise ValueError(f"must be at least {at_least:g} and at most {at_most:g}, not {text}")
    return text


class Selection(Resource):
    """Which of the ready clients take part in a round."""

    policy: SelectionPolicy = "All"
    """All: every ready client. Random: a uniform sample of the given fraction. Adaptive: the same number, preferring
    clients that are fast, reliable, have much data and a high loss; none is left out for long
    (docs/training/selection.md)."""
    fraction: Decimal = "1.0"
    """Share of the ready clients that a Random or Adaptive round takes: above 0, at most 1."""
    over_select: Decimal = "0"
    """So many more clients, as a share of those (0.3: 30 % more), are asked in a Random or Adaptive round; it ends with
    the updates of the fastest."""
    exploration: Decimal = "0.2"
    """Share of an Adaptive round's places for clients that are not known yet, or waited longest."""
    min_clients: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """The quorum: clients that must be ready before a round starts. Default: 2, or 1 where the job has only one."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Seed of the random choices."""

    @field_validator("fraction")
    @classmethod
    def _is_fraction(cls, fraction: str) -> str:
        if not 0 < float(fraction) <= 1:
            raise ValueError(f"must be above 0 and at most 1, not {fraction}")
        return fraction

    @field_validator("over_select")
    @classmethod
    def _is_surplus(cls, share: str) -> str:
        return _between(share, 0, 10)

    @field_validator("exploration")
    @classmethod
    def _is_share(cls, share: str) -> str:
        return _between(share, 0, 1)

    @model_validator(mode="after")
    def _surplus_of_a_sample(self) -> Self:
        if self.policy == "All" and float(self.over_select):
            raise ValueError("overSelect: goes with the policies Random and Adaptive; All asks everybody as it is")
        return self


class Stragglers(Resource):
    """What happens when clients of a round are slow or gone."""

    round_deadline_seconds: Annotated[int, Field(ge=1, le=30 * 86400)] = 3600
    """A round ends at the latest this long after it began, given minUpdates updates; else it waits for them."""
    min_updates: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """The fewest updates that make a round. Default: selection.minClients."""
    late: Literal["Discard", "Fold"] = "Discard"
    """What becomes of an update that arrives after its round has ended. Fold: it counts in the round in progress, with
    a weight that falls with its staleness. FedBuff and FedAsync always fold."""
    staleness_exponent: Decimal = "0.5"
    """a of the weight (1 + staleness)^-a of a late update; staleness is counted in rounds. From 0 to 10."""
    max_staleness: Annotated[int, Field(ge=1, le=1000)] = 5
    """Updates that are late by more rounds than this are discarded. So many more checkpoints are kept."""

    @field_validator("staleness_exponent")
    @classmethod
    def _is_exponent(cls, exponent: str) -> str:
        return _between(exponent, 0, 10)

    def weight(self, staleness: int) -> float:
        """By how much a late update counts less: polynomial decay.

        Xie et al., "Asynchronous Federated Optimization" (2019), section 5.2; Nguyen et al. (2022) use it with a = 0.5.
        """
        return float((1 + staleness) ** -float(self.staleness_exponent))
