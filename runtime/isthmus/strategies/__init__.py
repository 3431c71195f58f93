"""Strategies: rules that make the next global model from the updates of a round."""

from collections.abc import Callable, Mapping
from pathlib import Path

from isthmus_contracts.api.strategy import Strategy as StrategySpec

from ..tensors import GREATEST_WEIGHT
from .asynchronous.fedasync import FedAsync
from .asynchronous.fedbuff import FedBuff
from .averaging.fedavg import FedAvg
from .averaging.feddyn import FedDyn
from .averaging.fednova import FedNova
from .averaging.qfedavg import QFedAvg
from .averaging.scaffold import Scaffold
from .base import Setup, Strategy, StrategyError, Update
from .custom import Custom
from .deterministic import Deterministic
from .robust.coordinate_median import CoordinateMedian
from .robust.geometric_median import GeometricMedian
from .robust.krum import Krum, MultiKrum
from .robust.trimmed_mean import TrimmedMean
from .server_optimizers.fedadagrad import FedAdagrad
from .server_optimizers.fedadam import FedAdam
from .server_optimizers.fedavgm import FedAvgM
from .server_optimizers.fedyogi import FedYogi

__all__ = ["GREATEST_WEIGHT", "Setup", "Strategy", "StrategyError", "Update", "make_strategy"]

# FedProx differs from FedAvg on the client side only.
_RULES: Mapping[str, Callable[[Setup], Strategy]] = {
    "FedAvg": FedAvg,
    "FedProx": FedAvg,
    "FedAvgM": FedAvgM,
    "FedAdagrad": FedAdagrad,
    "FedAdam": FedAdam,
    "FedYogi": FedYogi,
    "CoordinateMedian": CoordinateMedian,
    "TrimmedMean": TrimmedMean,
    "Krum": Krum,
    "MultiKrum": MultiKrum,
    "GeometricMedian": GeometricMedian,
    "FedNova": FedNova,
    "QFedAvg": QFedAvg,
    "SCAFFOLD": Scaffold,
    "FedDyn": FedDyn,
    "FedBuff": FedBuff,
    "FedAsync": FedAsync,
}


def make_strategy(spec: StrategySpec, directory: Path | None = None, clients: int = 1) -> Strategy:
    """Return the server side of the manifest's algorithm. Raises :class:`ManifestError` if a class cannot be loaded."""
    setup = Setup(spec.values, directory, clients)
    rule = Custom(spec.class_, setup) if spec.class_ is not None else _RULES[spec.algorithm](setup)
    return Deterministic(rule, directory) if spec.deterministic and not rule.order_free else rule
