"""Rounds of a secure sum without a network, and the plain rounds that they must equal."""

import secrets
from collections.abc import Sequence

import torch

from isthmus.secure_aggregation.fixed_point import Contribution, quantise
from isthmus.secure_aggregation.layout import Parameters
from isthmus.secure_aggregation.primitives.masks import add_masks
from isthmus.secure_aggregation.sum_rule import SecureSum
from isthmus.strategies import Strategy, Update, make_strategy
from isthmus.tensors import State
from isthmus_contracts.api.strategy import Strategy as Spec


def rule(algorithm: str, clients: int) -> Strategy:
    return make_strategy(Spec.model_validate({"algorithm": algorithm}), clients=clients)


def secure(algorithm: str, clients: int, **settings: object) -> SecureSum:
    parameters = Parameters(
        algorithm=algorithm,
        max_clients=clients,
        metrics={"loss": 100.0},
        **settings,  # type: ignore[arg-type]
    )
    return SecureSum(rule(algorithm, clients), parameters)


def plain_round(strategy: Strategy, base: State, updates: Sequence[Update]) -> State:
    strategy.begin(base)
    for update in updates:
        strategy.accept(update)
    return {name: tensor.clone() for name, tensor in strategy.finish().items()}


def secure_round(
    strategy: SecureSum, base: State, updates: Sequence[Update], frozen: Sequence[str] = (), seed: bytes = b"round"
) -> State:
    """Run a round in which each update is masked with a key of its own, as a client's self mask."""
    layout = strategy.arrange(base, updates[0].buffers, frozen, seed)
    strategy.begin(base)
    keys = [(secrets.token_bytes(32), 1) for _ in updates]
    for update, key in zip(updates, keys, strict=True):
        contribution = Contribution(update.num_examples, update.scalars, {"loss": 1.0})
        masked = quantise(layout, base, update.tensors, contribution).tensors
        add_masks(masked, [key])
        strategy.accept(Update("masked", 0, masked))
    strategy.unmask(keys)
    return {name: tensor.clone() for name, tensor in strategy.finish().items()}


def model(seed: int = 0) -> State:
    """Return a small model with tensors of all kinds."""
    dice = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(40, 30, generator=dice),
        "bias": torch.randn((), generator=dice),
        "half": torch.randn(7, generator=dice).half(),
        "brain": torch.randn(5, generator=dice).bfloat16(),
        "double": torch.randn(3, generator=dice, dtype=torch.float64),
        "frozen": torch.randn(9, generator=dice),
        "empty": torch.empty(0, 4),
        "bn.running_mean": torch.zeros(6),
        "bn.running_var": torch.ones(6),
        "bn.num_batches_tracked": torch.tensor(2**60 + 7),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.tensor([3, 250], dtype=torch.uint8),
    }


BUFFERS = frozenset({"bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "mask", "bytes"})


def trained(base: State, clients: int, seed: int, scale: float = 0.02) -> list[Update]:
    """Return one update for each of a number of clients, which differ in weight and in direction."""
    dice = torch.Generator().manual_seed(seed)
    updates = []
    for number in range(clients):
        tensors = {}
        for name, old in base.items():
            if name in ("frozen", "mask", "bytes") or not old.numel():
                tensors[name] = old.clone()
            elif old.is_floating_point():
                size = scale * (20 if name in BUFFERS else 1) * (1 + number / 3)
                change = torch.randn(old.shape, generator=dice, dtype=torch.float64) * size
                tensors[name] = (old.double() + change).to(old.dtype)
            else:
                tensors[name] = old + 5 + number
        examples = int(torch.randint(10, 3000, (), generator=dice))
        numbers = {"steps": 3.0 + 2 * number, "travel": 0.1 * (3 + 2 * number)}
        updates.append(Update(f"pool/{number}", examples, tensors, BUFFERS, numbers))
    return updates
