"""Base class of rules that withstand clients whose updates are arbitrarily wrong."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch

from ...tensors import State
from ..base import Setup, Strategy, Update, change, narrow
from ..spill import Spill

Rule = Callable[[torch.Tensor], torch.Tensor]
"""Function that reduces a block of shape (updates, coordinates) to one row."""


class RobustRule(Strategy):
    """Rule that needs all updates. They are stored on disk until the end of the round, and read block by block.

    Every client has the same weight, whatever its number of examples: a malicious client could claim any number.
    """

    order_free = True

    def __init__(self, setup: Setup) -> None:
        self._directory = setup.directory
        self._model: State = {}
        self._spill = Spill(self._directory, {})
        self._called_buffer: Counter[str] = Counter()

    def begin(self, model: State) -> None:
        self._spill.close()
        self._model, self._spill = model, Spill(self._directory, model)
        self._called_buffer.clear()

    def accept(self, update: Update) -> None:
        self._spill.add(update.client, update.tensors)
        self._called_buffer.update(update.buffers)

    def finish(self) -> State:
        if not len(self._spill):
            raise RuntimeError("no update of the round could be stored")
        try:
            return self.combine(self._spill.rows())
        finally:
            self._spill.close()

    @abstractmethod
    def combine(self, rows: list[int]) -> State:
        """Return the next global model from the given rows of the file."""

    def joined(self, chosen: Sequence[int], rule: Rule, rows: Sequence[int]) -> State:
        """Return a model: ``rule`` of the chosen rows for trained weights, the median of all rows for other tensors.

        Statistics and counters do not enter the distances: an update whose weights are near to the others' may hold any
        values there.
        """
        trained = [name for name in self._model if self._is_trained(name, len(rows))]
        parts = self.blockwise(chosen, rule, trained)
        parts |= self.blockwise(rows, median, [name for name in self._model if name not in parts])
        return {name: parts[name] for name in self._model}

    def blockwise(self, rows: Sequence[int], rule: Rule, names: Sequence[str] | None = None) -> State:
        """Return a model, or only its named tensors, to whose blocks of rows ``rule`` was applied.

        A block of integers or booleans holds their changes, as int64.
        """
        result: State = {}
        width = self._spill.width(len(rows))
        for name in self._model if names is None else names:
            old = self._model[name]
            flat, base = torch.empty(old.numel(), dtype=old.dtype, device="cpu"), old.reshape(-1)
            for start in range(0, len(flat), width):
                part = base[start : start + width]
                block = self._spill.read(name, start, len(part), rows)
                if not old.is_floating_point():
                    block = change(block, part, block.dtype)
                flat[start : start + width] = narrow(rule(block), part)
            result[name] = flat.view(old.shape)
        return result

    def squared_distances(self, rows: Sequence[int]) -> torch.Tensor:
        """Return squared distances between all pairs of updates, over trained tensors: shape (rows, rows).

        Statistics are left out since they have another scale. The differences themselves are squared, in double
        precision, so that distances between similar updates are exact, however far away another update is.
        """
        distances = torch.zeros(len(rows), len(rows), dtype=torch.float64, device="cpu")
        one, other = torch.triu_indices(len(rows), len(rows), offset=1, device="cpu")
        for block in self._trained_blocks(rows):
            distances[one, other] += torch.pdist(block).square_()
        return distances + distances.T

    def products(self, rows: Sequence[int], origin: int) -> torch.Tensor:
        """Return inner products of the updates' differences from the one at index ``origin``, over trained tensors."""
        products = torch.zeros(len(rows), len(rows), dtype=torch.float64, device="cpu")
        for block in self._trained_blocks(rows):
            block.sub_(block[origin].clone())
            products.addmm_(block, block.T)
        return products

    def _trained_blocks(self, rows: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the trained weights of some updates, in double precision, block by block."""
        width = self._spill.width(len(rows))
        for name, old in self._model.items():
            if self._is_trained(name, len(rows)):
                for start in range(0, old.numel(), width):
                    yield self._spill.read(name, start, min(width, old.numel() - start), rows).double()

    def _is_trained(self, name: str, updates: int) -> bool:
        """Return whether at least half of the clients train a tensor: one alone cannot declare a parameter a buffer."""
        return self._model[name].is_floating_point() and 2 * self._called_buffer[name] <= updates


def mean(block: torch.Tensor, shares: torch.Tensor | None = None, origin: int = 0) -> torch.Tensor:
    """Return the mean of the rows, or, with ``shares``, row ``origin`` plus these shares of the differences from it.

    Computed from differences, so that values that all rows share are preserved bit for bit.
    """
    first = block[origin].double()
    away = first - block.double()
    return first - (away.mean(dim=0) if shares is None else shares @ away)


def median(block: torch.Tensor) -> torch.Tensor:
    """Return the median of each column; for an even number of rows, the mean of the middle two."""
    count = len(block)
    ordered, middle = block.sort(dim=0).values, (count - 1) // 2
    if count % 2:
        return ordered[middle].clone()
    low, high = ordered[middle], ordered[middle + 1]
    return low.sub(low - high, alpha=0.5) if block.dtype.is_floating_point else _midpoint(low, high)


def _midpoint(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the midpoint of integers, with halves rounded to even, without a sum that could overflow."""
    floor = (one & other) + ((one ^ other) >> 1)
    return floor + ((one ^ other) & floor & 1)
