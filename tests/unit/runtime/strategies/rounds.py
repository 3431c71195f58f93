"""Rounds of a strategy with generated updates."""

from pathlib import Path

import numpy as np
import torch

from isthmus.strategies import Strategy, Update, make_strategy
from isthmus.tensors import State
from isthmus_contracts.api.strategy import Strategy as Spec


def make(algorithm: str, directory: Path | None = None, clients: int = 1, **parameters: str) -> Strategy:
    return make_strategy(Spec.model_validate({"algorithm": algorithm, "parameters": parameters}), directory, clients)


def model(seed: int = 0) -> State:
    torch.manual_seed(seed)
    return {"w": torch.randn(3, 4), "b": torch.randn(4, dtype=torch.float64), "seen": torch.tensor(10)}


def updates(base: State, count: int, seed: int, spread: float = 0.3) -> list[Update]:
    """Generate updates with different numbers of examples, each some distance from the global model."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        tensors = {
            name: tensor + spread * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if tensor.is_floating_point() else tensor + number
            for name, tensor in base.items()
        }  # fmt: skip
        made.append(Update(f"p/{number}", 5 + 3 * number, tensors))
    return made


def run(strategy: Strategy, base: State, contributions: list[Update]) -> State:
    strategy.begin(base)
    for update in contributions:
        strategy.accept(update)
    return strategy.finish()


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def weighted_mean(contributions: list[Update], name: str) -> np.ndarray:
    return np.average(
        [array(update.tensors[name]) for update in contributions],
        axis=0,
        weights=[update.num_examples for update in contributions],
    )
