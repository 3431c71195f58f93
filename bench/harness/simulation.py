"""Federation in one process: the real strategies and corrections of the client library, without a network.

With asynchronous strategies time is virtual and the clients have different speeds.
"""

import dataclasses
import itertools
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from isthmus.aggregator.updates.base_models import rebase
from isthmus.client.corrections.factory import CorrectionInputs, make_correction
from isthmus.client.state.parameter_names import ParameterNames
from isthmus.strategies import Strategy, Update, make_strategy
from isthmus.tensors import State, snapshot
from isthmus_contracts.api.participation import Stragglers
from isthmus_contracts.api.strategy import Strategy as Spec
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_examples.training import Examples, Settings, evaluate, train

# Maximum ratio of the slowest client's duration to the fastest one's.
_SPREAD = 4.0
# No limit on staleness: if every update makes a model, an update's staleness is about the number of other clients.
_STRAGGLERS = Stragglers()


class Client:
    """Data of one client, and its state between rounds."""

    def __init__(self, index: int, data: Examples, settings: Settings) -> None:
        self.name = f"pool/{index}"
        self._index = index
        self._data = data
        self._settings = settings
        self._memory: State = {}

    def update(self, spec: Spec, companion: State, model: nn.Module, seed: int) -> Update:
        """Train the model for one round, as the client library does for an offer."""
        parameters = {name: repr(value) for name, value in spec.values.items()}
        offer = pb.Offer(kind=pb.Offer.TRAIN, algorithm=spec.algorithm, parameters=parameters)
        names = ParameterNames.of(model, model.state_dict())
        measured = evaluate(model, self._data) if spec.algorithm == "QFedAvg" else {}
        correction = make_correction(offer, names, measured, CorrectionInputs(self._memory, companion))
        optimizer = torch.optim.SGD(model.parameters(), lr=self._settings.learning_rate)
        correction.attach(optimizer)
        train(model, self._data, optimizer, self._settings, seed * 1000 + self._index)
        scalars = correction.scalars({})
        self._memory = correction.updated_state() or {}
        correction.close()
        return Update(self.name, len(self._data), snapshot(model.state_dict()), scalars=scalars)


def federate(
    spec: Spec, model: nn.Module, clients: list[Client], rounds: int, seed: int,
    protect: Callable[[Strategy], Strategy] = lambda rule: rule,
) -> Iterator[int]:  # fmt: skip
    """Train with the strategy; yield the number of each round, with its global model loaded.

    ``protect`` can wrap the aggregator's rule.
    """
    with tempfile.TemporaryDirectory() as scratch:
        strategy = protect(make_strategy(spec, Path(scratch), len(clients)))
        if spec.round_size is None:
            yield from by_rounds(spec, strategy, model, clients, rounds, seed)
        else:
            yield from without_waiting(spec, strategy, model, clients, rounds, seed)


def by_rounds(
    spec: Spec, strategy: Strategy, model: nn.Module, clients: list[Client], rounds: int, seed: int
) -> Iterator[int]:
    """Run synchronous rounds with every client."""
    state = snapshot(model.state_dict())
    for number in range(1, rounds + 1):
        strategy.begin(state)
        for client in clients:
            model.load_state_dict(state)
            strategy.accept(client.update(spec, strategy.companion(), model, seed * 1000 + number))
        state = snapshot(strategy.finish())
        model.load_state_dict(state)
        yield number


@dataclass
class Task:
    """Training of a client: its round, its base model and its end."""

    client: Client
    round: int
    base: State
    ends: float


def without_waiting(
    spec: Spec, strategy: Strategy, model: nn.Module, clients: list[Client], rounds: int, seed: int
) -> Iterator[int]:
    """Run asynchronous rounds, which end after their first updates.

    Clients with an accepted update start again with the next model; the others continue.

    The number of updates is that of the same number of synchronous rounds; the yielded numbers count such rounds.
    """
    dice, size = random.Random(seed), spec.round_size  # noqa: S311 - a simulation
    assert size is not None
    pace = {client.name: dice.uniform(1.0, _SPREAD) for client in clients}
    state, now, updates = snapshot(model.state_dict()), 0.0, 0
    at_work: dict[str, Task] = {}
    for number in itertools.count(1):
        for client in clients:
            if client.name not in at_work:
                at_work[client.name] = Task(client, number, state, now + pace[client.name] * dice.uniform(0.8, 1.2))
        strategy.begin(state)
        for task in sorted(at_work.values(), key=lambda task: task.ends)[:size]:
            del at_work[task.client.name]
            model.load_state_dict(task.base)
            update = task.client.update(spec, {}, model, seed * 1000 + number)
            if staleness := number - task.round:
                update = dataclasses.replace(update, discount=_STRAGGLERS.weight(staleness))
                rebase(update.tensors, task.base, state, (), strategy.rebases)
            strategy.accept(update)
            now, updates = task.ends, updates + 1
        state = snapshot(strategy.finish())
        if updates % len(clients) < size:
            model.load_state_dict(state)
            yield updates // len(clients)
        if updates >= rounds * len(clients):
            return
