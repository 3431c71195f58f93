"""Training script for tests: linear regression on data that depends on the client's number.

PAUSE: extra seconds per round. HOLD: round from which it waits for the file ``go``, so that a test that
disturbs a run does so before its end. BREAK: "round:exception" raises there. NAN: round in which most weights
are NaN. NORM: "layer" normalises by LayerNorm rather than BatchNorm1d. WIDTH: of a hidden layer that makes the model
larger. COUNT: the evaluation also returns how many models it has measured. SCALE: what the trained weights are
multiplied by. STEPS: of the optimizer in a round. Each client writes a list of the rounds that it trained, and of the
digests of their initial weights.
"""

import hashlib
import itertools
import os
import time
from pathlib import Path

import torch

import isthmus


def data(client: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(client)
    inputs = torch.randn(10 + 7 * client, 5, generator=generator)
    return inputs, inputs @ torch.arange(5.0) + client


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    width = int(os.environ.get("WIDTH", "0"))
    wide = [torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU(),
            torch.nn.Linear(width, 8)] if width else []  # fmt: skip
    norm = torch.nn.LayerNorm(8) if os.environ.get("NORM") == "layer" else torch.nn.BatchNorm1d(8)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), norm, *wide, torch.nn.Linear(8, 1))


def digest(state: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def train(model: torch.nn.Module, client: int, optimizer: torch.optim.Optimizer, steps: int = 3) -> float:
    inputs, targets = data(client)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(inputs).squeeze(1) - targets).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss)


def main() -> None:
    torch.set_num_threads(1)
    client = isthmus.context().client
    model = build()
    bad_round, _, exception = os.environ.get("BREAK", "0:").partition(":")
    measured = itertools.count(1)

    def evaluate() -> dict[str, float]:
        metrics = {"score": float(client), "num_examples": client + 1.0}
        return metrics | ({"measured": float(next(measured))} if "COUNT" in os.environ else {})

    for rnd in isthmus.rounds(model, evaluate=evaluate):
        with Path(f"trained-{client}").open("a") as file:
            file.write(f"{rnd.number}\n")
        with Path(f"began-{client}").open("a") as file:
            file.write(f"{rnd.number} {digest(model.state_dict())}\n")
        if rnd.number == int(bad_round):
            raise ValueError(exception)
        time.sleep(float(os.environ.get("PAUSE", "0")))
        while rnd.number >= int(os.environ.get("HOLD", "1000000")) and not Path("go").exists():
            time.sleep(0.01)
        optimizer = rnd.wrap(torch.optim.SGD(model.parameters(), lr=float(rnd.config["rate"])))
        loss = train(model, client, optimizer, int(os.environ.get("STEPS", "3")))
        if rnd.number == int(os.environ.get("NAN", "0")):
            with torch.no_grad():
                max(model.parameters(), key=torch.numel).fill_(float("nan"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(float(os.environ.get("SCALE", "1")))
        rnd.submit(num_examples=len(data(client)[0]), loss=loss)


if __name__ == "__main__":
    main()
