"""What the rules share that withstand clients whose updates are arbitrarily wrong."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from ..tensors import State
from .base import Setup, Strategy, Update, change, narrow, wide
from .spill import Spill


class RobustRule(Strategy):
    """Needs all updates: they wait on disk for the end of the round, and memory stays at a block of them.

    Every client has one voice, whatever number of examples it claims: a client that lies would lie about that too.
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
            raise RuntimeError("no update of the round could be kept")
        try:
            return self.combine(self._spill.rows())
        finally:
            self._spill.close()

    @abstractmethod
    def combine(self, rows: list[int]) -> State:
        """The next global model from the given rows of the file."""

    def blockwise(self, rows: Sequence[int], rule: Callable[[torch.Tensor], torch.Tensor]) -> State:
        """Makes a model of what ``rule`` makes of each block (a row for each update, a column for each coordinate).

        A block of integers or booleans is int64 and holds by how much they moved.
        """
        result: State = {}
        width = self._spill.width(len(rows))
        for name, old in self._model.items():
            flat, base = torch.empty(old.numel(), dtype=old.dtype, device="cpu"), old.reshape(-1)
            for start in range(0, len(flat), width):
                part = base[start : start + width]
                block = self._spill.read(name, start, len(part), rows)
                if not old.is_floating_point():
                    block = change(block, part, block.dtype)
                flat[start : start + width] = narrow(rule(block), part)
            result[name] = flat.view(old.shape)
        return result

    def mean(self, rows: Sequence[int], weights: torch.Tensor | None = None) -> State:
        """The mean of some updates, with weights (which sum to 1) or without. Of one update, it is the copy."""
        if len(rows) == 1:
            return self._spill.update(rows[0])
        shares = (
            torch.full((len(rows),), 1 / len(rows), dtype=torch.float64, device="cpu") if weights is None else weights
        )

        def mean(block: torch.Tensor) -> torch.Tensor:
            dtype = wide(block.dtype)
            return shares.to(dtype) @ block.to(dtype)

        return self.blockwise(rows, mean)

    def squared_distances(self, rows: Sequence[int]) -> torch.Tensor:
        """Between every two updates, over what is trained: statistics of batch-norm layers are of another scale.

        From inner products of the differences from the global model, in double precision.
        """
        products = torch.zeros(len(rows), len(rows), dtype=torch.float64, device="cpu")
        width = self._spill.width(len(rows))
        for name, old in self._model.items():
            # A single client cannot make a parameter a buffer by calling it one.
            if not old.is_floating_point() or 2 * self._called_buffer[name] > len(rows):
                continue
            base = old.reshape(-1)
            for start in range(0, len(base), width):
                part = base[start : start + width]
                block = self._spill.read(name, start, len(part), rows).double().sub_(part)
                products.addmm_(block, block.T)
        norms = products.diagonal()
        return (norms[:, None] + norms[None, :] - 2 * products).clamp_(min=0).fill_diagonal_(0)
