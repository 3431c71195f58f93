"""Privacy in the manifest: bounds on what the model reveals about one client's data."""

import math
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import field_validator, model_validator

from ..dp_accounting import Spent
from ..dp_skellam import epsilon_of_line
from .fields import Decimal, Resource, single_precision_problem
from .secure_aggregation import SecureAggregation
from .strategy import Algorithm

# Strategies that use nothing of a client but the noisy mean of the clipped changes. All others are refused. A strategy
# belongs here only if it uses no scalars of the clients, no companion, no single updates and no update twice.
PROTECTED: tuple[Algorithm, ...] = ("FedAvg", "FedProx", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi")
# What each of the others uses beside that mean. A test checks that every algorithm is in one of the two tables.
UNPROTECTED: Mapping[Algorithm, str] = {
    **dict.fromkeys(
        ("CoordinateMedian", "TrimmedMean", "Krum", "MultiKrum", "GeometricMedian"),
        "which compares single updates: noise is added to their sum",
    ),
    "FedNova": "which scales updates by the clients' numbers of steps",
    "QFedAvg": "which weights updates by the clients' losses",
    "SCAFFOLD": "which shares the clients' gradients beside their updates",
    "FedDyn": "which keeps the clients' drift beside their updates",
    **dict.fromkeys(("FedBuff", "FedAsync"), "in which a client may count twice in a round"),
    "Custom": "which may use single updates in any way",
}


class AdaptiveClipping(Resource):
    """Clipping norm that follows the updates (Andrew et al. 2021): after each round it moves towards the given quantile
    of their norms. The number of updates within the norm, which it needs, is counted with noise."""

    quantile: Decimal = "0.5"
    """Share of the updates that should not be clipped: above 0, below 1."""
    learning_rate: Decimal = "0.2"
    """Rate of the geometric update of the norm: above 0, at most 1."""
    count_noise: Decimal | None = None
    """Standard deviation of the noise on the count, in clients: more than half of noiseMultiplier. The noise on the sum
    grows so that both together cost what noiseMultiplier says. Default: a twentieth of a round's expected updates, and
    at least noiseMultiplier."""

    @field_validator("quantile")
    @classmethod
    def _is_quantile(cls, text: str) -> str:
        if not 0 < float(text) < 1:
            raise ValueError(f"must be above 0 and below 1, not {text}")
        return text

    @field_validator("learning_rate")
    @classmethod
    def _is_rate(cls, text: str) -> str:
        if not 0 < float(text) <= 1:
            raise ValueError(f"must be above 0 and at most 1, not {text}")
        return text

    @field_validator("count_noise")
    @classmethod
    def _is_deviation(cls, text: str | None) -> str | None:
        if text is not None and not 0 < float(text) <= 1e5:
            raise ValueError(f"must be above 0 and at most 100000, not {text}")
        return text


class DifferentialPrivacy(Resource):
    """User-level differential privacy by DP-FedAvg (McMahan et al. 2018). It protects everything that one client
    contributes to the model."""

    clip_norm: Decimal
    """Largest L2 norm of an update's change of the model, over all tensors together. Longer changes are scaled down to
    it, so it bounds one client's effect on a round's sum. Above 0. With adaptiveClipping: that of the first round."""
    noise_multiplier: Decimal
    """Standard deviation of the Gaussian noise on each round's sum, in clipNorms. Above 0."""
    delta: Decimal = "1e-5"
    """The delta of the reported epsilon: above 0, and less than one over the number of clients that train."""
    max_epsilon: Decimal | None = None
    """The privacy budget. Training ends, with its present model, before the round that would exceed it. Default: no
    budget; all rounds run."""
    noise: Literal["Aggregator", "Distributed"] = "Aggregator"
    """The source of the noise. Aggregator: the aggregator adds it once to the sum, and must be trusted to do so.
    Distributed: each client adds a share before it masks its update, so not even the aggregator sees a sum with less
    noise; this needs privacy.secureAggregation."""
    adaptive_clipping: AdaptiveClipping | None = None
    """Let the clipping norm follow the updates. Default: clipNorm holds for all rounds."""

    @property
    def distributed(self) -> bool:
        """True if the clients add the noise."""
        return self.noise == "Distributed"

    @field_validator("clip_norm", "noise_multiplier")
    @classmethod
    def _is_size(cls, text: str) -> str:
        if not 0 < float(text) <= 1e5:
            raise ValueError(f"must be above 0 and at most 100000, not {text}")
        if problem := single_precision_problem(text):
            raise ValueError(problem)
        return text

    @field_validator("delta")
    @classmethod
    def _is_delta(cls, text: str) -> str:
        if not 1e-15 <= float(text) < 1:
            raise ValueError(f"must be at least 1e-15 and below 1, not {text}")
        return text

    @model_validator(mode="after")
    def _splits_the_noise(self) -> Self:
        noise = self.adaptive_clipping.count_noise if self.adaptive_clipping is not None else None
        if noise is not None and float(noise) <= float(self.noise_multiplier) / 2:
            raise ValueError(
                f"adaptiveClipping.countNoise: {noise} is not more than half of noiseMultiplier,"
                f" {self.noise_multiplier}, so the count alone would cost more than a round may"
            )
        return self

    @model_validator(mode="after")
    def _pays_a_round(self) -> Self:
        if self.max_epsilon is None:
            return self
        if not (limit := float(self.max_epsilon)) > 0 or not math.isfinite(limit):
            raise ValueError(f"maxEpsilon: must be above 0 and finite, not {self.max_epsilon}")
        noise, delta = float(self.noise_multiplier), float(self.delta)
        if self.distributed:
            first = epsilon_of_line(1 / (2 * noise * noise), 0.0, delta)
        else:
            first = Spent().after(noise).epsilon(delta)
        if first > limit:
            raise ValueError(
                f"maxEpsilon: {self.max_epsilon} does not pay for one round, which costs {first:.4g} with"
                f" noiseMultiplier {self.noise_multiplier} and delta {self.delta}; raise noiseMultiplier"
            )
        return self

    def problem(self, algorithm: Algorithm, trainers: int) -> str | None:
        """Return the problem with a job of ``trainers`` clients, after the field's name, or ``None``."""
        if algorithm not in PROTECTED:
            reason = UNPROTECTED.get(algorithm, "which is not known to use only the noisy mean of the updates")
            use = f"{', '.join(PROTECTED[:-1])} or {PROTECTED[-1]}"
            return f"differentialPrivacy: does not go with {algorithm}, {reason}; use {use}"
        if float(self.delta) * trainers >= 1:
            return f"differentialPrivacy.delta: {self.delta} is not less than 1/{trainers}, one over the clients"
        return None


class Privacy(Resource):
    """Protection of clients' data from everyone who sees the model (docs/training/privacy.md)."""

    differential_privacy: DifferentialPrivacy | None = None
    """Clip each client's contribution, and add noise to each round's sum. Default: none."""
    secure_aggregation: SecureAggregation | None = None
    """Mask the clients' updates, so that the aggregator sees their sum only. An empty mapping, {}, switches it on with
    safe defaults. Default: off."""

    @field_validator("secure_aggregation", mode="before")
    @classmethod
    def _is_mapping(cls, given: object) -> object:
        if isinstance(given, bool | str | int):
            raise ValueError(f"must be a mapping, not {given!r}; {{}} switches it on with safe defaults")
        return given

    @model_validator(mode="after")
    def _masks_distributed_noise(self) -> Self:
        private = self.differential_privacy
        if private is not None and private.distributed and self.secure_aggregation is None:
            raise ValueError(
                "differentialPrivacy.noise: Distributed needs privacy.secureAggregation, as a client's share of the"
                " noise does not protect its update alone; add secureAggregation: {}, or use Aggregator"
            )
        return self
