"""Aggregation rules of the manifest, and their parameters with defaults and bounds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .fields import ClassReference, Decimal, Resource, single_precision_problem

Algorithm = Literal[
    "FedAvg", "FedProx", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi",
    "CoordinateMedian", "TrimmedMean", "Krum", "MultiKrum", "GeometricMedian",
    "FedNova", "QFedAvg", "SCAFFOLD", "FedDyn",
    "FedBuff", "FedAsync",
    "Custom",
]  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """Numeric parameter of an algorithm."""

    default: float
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None
    whole: bool = False

    def problem(self, text: str) -> str | None:
        """Return what is wrong with a value, or ``None``."""
        value = float(text)
        if not math.isfinite(value):
            return f"must be finite, not {text}"
        if problem := single_precision_problem(text):
            return problem
        if self.whole and value != int(value):
            return f"must be a whole number, not {text}"
        if self.at_least is not None and value < self.at_least:
            return f"must be at least {self.at_least:g}, not {text}"
        if self.above is not None and value <= self.above:
            return f"must be above {self.above:g}, not {text}"
        if self.below is not None and value >= self.below:
            return f"must be below {self.below:g}, not {text}"
        if self.at_most is not None and value > self.at_most:
            return f"must be at most {self.at_most:g}, not {text}"
        return None


def _rate(default: float) -> Parameter:
    return Parameter(default, above=0.0)


def _decay(default: float) -> Parameter:
    return Parameter(default, at_least=0.0, below=1.0)


def _count(default: int) -> Parameter:
    return Parameter(default, at_least=0.0, whole=True)


# The module of each strategy, and docs/training/strategies.md, give its paper and the meaning of its parameters.
ALGORITHM_PARAMETERS: Mapping[Algorithm, Mapping[str, Parameter]] = {
    "FedAvg": {},
    "FedProx": {"mu": Parameter(0.01, at_least=0.0)},
    "FedAvgM": {"learningRate": _rate(1.0), "momentum": _decay(0.9)},
    "FedAdagrad": {"learningRate": _rate(0.1), "beta1": _decay(0.0), "tau": _rate(1e-3)},
    "FedAdam": {"learningRate": _rate(0.01), "beta1": _decay(0.9), "beta2": _decay(0.99), "tau": _rate(1e-3)},
    "FedYogi": {"learningRate": _rate(0.01), "beta1": _decay(0.9), "beta2": _decay(0.99), "tau": _rate(1e-3)},
    "CoordinateMedian": {},
    "TrimmedMean": {"trim": Parameter(0.1, at_least=0.0, below=0.5)},
    "Krum": {"byzantine": _count(1)},
    "MultiKrum": {"byzantine": _count(1), "keep": _count(0)},
    "GeometricMedian": {"smoothing": _rate(1e-6)},
    "FedNova": {},
    "QFedAvg": {"q": Parameter(1.0, at_least=0.0), "learningRate": _rate(0.1)},
    "SCAFFOLD": {"learningRate": _rate(1.0)},
    "FedDyn": {"alpha": _rate(0.1)},
    "FedBuff": {"bufferSize": Parameter(10, at_least=1.0, whole=True), "learningRate": _rate(1.0)},
    "FedAsync": {"mixing": Parameter(0.6, above=0.0, at_most=1.0)},
    "Custom": {},
}
# Rules that give every client one vote a round. An update from an earlier round would be a second vote.
_ONE_UPDATE_PER_CLIENT = frozenset({"CoordinateMedian", "TrimmedMean", "Krum", "MultiKrum", "GeometricMedian"})
# Client and server compute the same correction, each from the client's change.
_TWO_SIDED = frozenset({"SCAFFOLD", "FedDyn"})


class Strategy(Resource):
    """Rule that computes the next global model from the updates of a round."""

    algorithm: Algorithm = "FedAvg"
    """FedAvg: mean weighted by examples (McMahan et al. 2017). FedProx: the same, with a proximal term of weight mu
    in the clients' loss (Li et al. 2020). FedAvgM: momentum on the server (Hsu et al. 2019). FedAdagrad, FedAdam,
    FedYogi: adaptive optimizers on the server (Reddi et al. 2021). CoordinateMedian, TrimmedMean (Yin et al. 2018),
    Krum, MultiKrum (Blanchard et al. 2017) and GeometricMedian (Pillutla et al. 2022) withstand wrong updates of
    clients. FedNova: for clients that take different numbers of steps (Wang et al. 2020). QFedAvg: fairness (Li et
    al. 2020). SCAFFOLD (Karimireddy et al. 2020) and FedDyn (Acar et al. 2021) keep clients from drifting apart.
    FedBuff (Nguyen et al. 2022) and FedAsync (Xie et al. 2019) are asynchronous: a round ends with its first bufferSize
    updates, or its first one; later ones count in a later round, weighted by their staleness.
    Custom: the strategy that class names."""
    class_: Annotated[ClassReference | None, Field(alias="class")] = None
    """For Custom only: module:Class in the aggregator's image, a subclass of isthmus.strategies.Strategy."""
    parameters: dict[str, Decimal] = {}
    """Parameters of the algorithm, as decimal strings; docs/training/strategies.md lists them with their defaults.
    FedProx: mu (default 0.01)."""
    deterministic: bool = False
    """Combine the updates of a round in the order of the clients, not of their arrival. The same updates then give the
    same model, bit for bit. They are kept on disk until the end of the round (one model's size each)."""

    @model_validator(mode="after")
    def _known_parameters(self) -> Self:
        known = ALGORITHM_PARAMETERS[self.algorithm]
        for name, text in self.parameters.items():
            if self.algorithm == "Custom":
                # The class checks its own parameters.
                if not math.isfinite(float(text)):
                    raise ValueError(f"parameters.{name}: must be finite, not {text}")
                continue
            if name not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                raise ValueError(f"parameters.{name}: unknown for {self.algorithm}; {takes}")
            if problem := known[name].problem(text):
                raise ValueError(f"parameters.{name}: {problem}")
        return self

    @model_validator(mode="after")
    def _class_of_custom(self) -> Self:
        if self.algorithm == "Custom" and self.class_ is None:
            raise ValueError("class: is missing; Custom needs module:Class")
        if self.algorithm != "Custom" and self.class_ is not None:
            raise ValueError(f"class: goes with the algorithm Custom, not with {self.algorithm}")
        return self

    @property
    def fewest_updates(self) -> int:
        """Minimum number of updates of a round for which the algorithm's guarantee holds."""
        if "byzantine" not in ALGORITHM_PARAMETERS[self.algorithm]:
            return 1
        return 2 * int(self.values["byzantine"]) + 3

    @property
    def round_size(self) -> int | None:
        """Number of updates that end a round of an asynchronous algorithm; ``None`` for synchronous ones."""
        if self.algorithm == "FedAsync":
            return 1
        return int(self.values["bufferSize"]) if self.algorithm == "FedBuff" else None

    @property
    def one_update_per_client(self) -> bool:
        """True if a client may have only one update in a round."""
        return self.algorithm in _ONE_UPDATE_PER_CLIENT

    @property
    def against_sparse_updates(self) -> str | None:
        """Reason why the rule does not work with sparse updates; ``None`` if it does."""
        if self.one_update_per_client:
            return "may drop what a client sent, and with it what error feedback counts as delivered"
        if self.algorithm in _TWO_SIDED:
            return "needs each client's whole change at the server, as the client remembers it"
        return None

    @property
    def values(self) -> dict[str, float]:
        """All parameters of the algorithm: given values, or else defaults."""
        defaults = {name: parameter.default for name, parameter in ALGORITHM_PARAMETERS[self.algorithm].items()}
        return defaults | {name: float(text) for name, text in self.parameters.items()}
