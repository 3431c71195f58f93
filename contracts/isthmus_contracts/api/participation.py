"""Selection of a round's clients, and treatment of stragglers."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from .fields import Decimal, Resource

SelectionPolicy = Literal["All", "Random", "Adaptive"]


def _between(text: str, at_least: float, at_most: float) -> str:
    if not at_least <= float(text) <= at_most:
        raise ValueError(f"must be at least {at_least:g} and at most {at_most:g}, not {text}")
    return text


class Selection(Resource):
    """Selection of the ready clients that take part in a round."""

    policy: SelectionPolicy = "All"
    """All: every ready client. Random: a uniform sample of the given fraction. Adaptive: the same number, preferring
    clients that are fast, reliable, have much data and a high loss; every client takes part from time
    to time (docs/training/selection.md)."""
    fraction: Decimal = "1.0"
    """Share of the ready clients in a Random or Adaptive round: above 0, at most 1."""
    over_select: Decimal = "0"
    """Additional clients of a Random or Adaptive round, as a share of the selected ones (0.3: 30 % more). The round
    ends once the needed number of updates has arrived."""
    exploration: Decimal = "0.2"
    """Share of an Adaptive round's places for clients that were never selected, or waited longest."""
    min_clients: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """The quorum: clients that must be ready before a round starts. Default: 2, or 1 if the job has only one client.
    With privacy.secureAggregation: its minClients."""
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
            raise ValueError("overSelect: goes with the policies Random and Adaptive; All selects every client anyway")
        return self


class Stragglers(Resource):
    """Treatment of clients that are slow or gone."""

    round_deadline_seconds: Annotated[int, Field(ge=1, le=30 * 86400)] = 3600
    """Deadline of a round, in seconds. With fewer than minUpdates updates, the round waits for them."""
    min_updates: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Minimum number of updates of a round. Default: selection.minClients."""
    late: Literal["Discard", "Fold"] = "Discard"
    """Treatment of an update that arrives after its round has ended. Fold: it counts in the present round, with a
    weight that falls with its staleness. FedBuff and FedAsync always fold."""
    staleness_exponent: Decimal = "0.5"
    """Exponent a in the weight (1 + staleness)^-a of a late update, with staleness in rounds. From 0 to 10."""
    max_staleness: Annotated[int, Field(ge=1, le=1000)] = 5
    """Updates that are late by more rounds than this are discarded. This number of additional checkpoints is kept."""

    @field_validator("staleness_exponent")
    @classmethod
    def _is_exponent(cls, exponent: str) -> str:
        return _between(exponent, 0, 10)

    def weight(self, staleness: int) -> float:
        """Return the factor of a late update's weight: polynomial decay.

        Xie et al., "Asynchronous Federated Optimization" (2019), section 5.2; Nguyen et al. (2022) use it with a = 0.5.
        """
        return float((1 + staleness) ** -float(self.staleness_exponent))
