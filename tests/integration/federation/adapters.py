"""Training script for tests: trains a low-rank change of a frozen layer, which differs between clients."""

import hashlib
import os
from pathlib import Path

import torch

import isthmus


class LowRank(torch.nn.Module):
    """Linear layer with a low-rank change, as in LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(6, 3).requires_grad_(False)
        self.lora_a = torch.nn.Parameter(torch.randn(2, 6))
        self.lora_b = torch.nn.Parameter(torch.zeros(3, 2))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(values) + values @ self.lora_a.T @ self.lora_b.T
        return result


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def main() -> None:
    client = isthmus.context().client
    torch.manual_seed(client)
    model = torch.nn.Sequential(LowRank(), torch.nn.BatchNorm1d(3).requires_grad_(False))
    frozen = digest(model[0].base.weight)
    inputs, targets = torch.randn(16, 6), torch.randn(16, 3)
    parameters = "trainable" if client else ["*.lora_[ab]"]  # the same tensors, chosen in two ways
    for rnd in isthmus.rounds(model, parameters=os.environ.get("PATTERNS", "").split() or parameters):
        with Path(f"began-{client}").open("a") as file:
            file.write(f"{rnd.number} {digest(model[0].lora_b.detach())}\n")
        assert digest(model[0].base.weight) == frozen
        optimizer = rnd.wrap(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05))
        for _ in range(2):
            optimizer.zero_grad()
            (model(inputs) - targets).square().mean().backward()
            optimizer.step()
        rnd.submit(num_examples=16)


if __name__ == "__main__":
    main()
