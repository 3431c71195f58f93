"""Training loop and evaluation of the examples: ordinary PyTorch, without anything federated."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Examples:
    """Inputs and their labels, row by row."""

    inputs: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of one client in one round."""

    epochs: int
    learning_rate: float
    batch_size: int

    def updated(self, config: Mapping[str, str]) -> "Settings":
        """Return these settings with the values of the manifest's ``task.config``."""
        return Settings(
            epochs=int(config.get("localEpochs", self.epochs)),
            learning_rate=float(config.get("learningRate", self.learning_rate)),
            batch_size=int(config.get("batchSize", self.batch_size)),
        )


def train(model: nn.Module, data: Examples, optimizer: torch.optim.Optimizer, settings: Settings, seed: int) -> float:
    """Train for some epochs, in an order that depends on ``seed`` only. Return the last epoch's mean loss."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    mean = 0.0
    for _ in range(settings.epochs):
        mean = 0.0
        order = torch.randperm(len(data), generator=generator)
        for batch in torch.split(order, settings.batch_size):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(data.inputs[batch]), data.labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            mean += loss.item() * len(batch) / len(data)
    return mean


@torch.no_grad()
def evaluate(model: nn.Module, data: Examples) -> dict[str, float]:
    """Return accuracy and mean loss on held-out data, and its size, which is their weight."""
    model.eval()
    scores = model(data.inputs)
    return {
        "accuracy": float((scores.argmax(dim=1) == data.labels).float().mean()),
        "eval_loss": float(functional.cross_entropy(scores, data.labels)),
        "num_examples": len(data),
    }
