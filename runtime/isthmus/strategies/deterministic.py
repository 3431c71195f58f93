"""Aggregation that is bit for bit independent of the order in which updates arrive."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..tensors import State
from .base import Strategy, Update
from .spill import Spill


class Deterministic(Strategy):
    """Wrapper of a rule that sums updates as they arrive: floating-point sums depend on the order.

    The updates are stored on disk, and passed to the rule at the end of the round, in the order of their clients'
    names. This costs disk space and time for one model per update, and no folding is done during the round.
    """

    def __init__(self, rule: Strategy, directory: Path | None) -> None:
        self._rule = rule
        self._directory = directory
        self._spill = Spill(directory, {})
        self._updates: list[Update] = []
        self.scalars, self.rebases = rule.scalars, rule.rebases

    def begin(self, model: State) -> None:
        self._rule.begin(model)
        self._spill.close()
        self._spill, self._updates = Spill(self._directory, model), []

    def accept(self, update: Update) -> None:
        self._spill.add(update.client, update.tensors)
        self._updates.append(replace(update, tensors={}))

    def finish(self) -> State:
        for row in self._spill.rows():
            self._rule.accept(replace(self._updates[row], tensors=self._spill.update(row)))
        self._spill.close()
        return self._rule.finish()

    def release(self) -> None:
        self._rule.release()

    def companion(self) -> State:
        return self._rule.companion()

    def problem_with(self, scalars: Mapping[str, float]) -> str | None:
        return self._rule.problem_with(scalars)

    def state(self) -> State:
        return self._rule.state()

    def load_state(self, state: State) -> None:
        self._rule.load_state(state)
