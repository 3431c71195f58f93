"""Base models of updates that may still arrive, and the conversion of an update to a newer base model."""

from collections.abc import Collection

import torch

from ...tensors import State
from ..storage.checkpoints import Checkpoint, CheckpointStore


class BaseModels:
    """The newest ``depth`` committed models. Models older than the newest are needed only if late updates count.

    Large models are backed by their files: only pages that are accessed occupy memory.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._models: dict[int, Checkpoint] = {}

    def restore(self, store: CheckpointStore, newest: int) -> None:
        """Load the older models that an earlier process committed. Blocks."""
        for number in store.numbers():
            if newest - self._depth < number < newest:
                self.add(store.load(number))

    def add(self, checkpoint: Checkpoint) -> None:
        """Add a new model and drop the oldest."""
        self._models[checkpoint.round] = checkpoint
        for number in [number for number in self._models if number <= checkpoint.round - self._depth]:
            del self._models[number]

    def find(self, number: int, digest: str) -> State | None:
        """Return the model of a round, if it is still present and has that digest."""
        checkpoint = self._models.get(number)
        return checkpoint.state if checkpoint is not None and checkpoint.digest == digest else None


def rebase(tensors: State, old: State, new: State, buffers: Collection[str], weights: bool = True) -> None:
    """Apply an update's change relative to ``old`` to ``new`` instead, in place.

    ``tensors``: the update; all three have the same names, shapes and dtypes. Floating-point statistics, named by
    ``buffers``, keep the client's values; integers and booleans (counters) are rebased too, because the
    update would otherwise reset the model's counters. ``weights``: whether weights are rebased.
    """
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                tensor.copy_(_moved(new[name], old[name], tensor))
            elif weights and name not in buffers:
                # Subtract the difference from `old`: if it is zero, the result equals `new` bit for bit.
                if tensor.dtype not in (torch.float16, torch.bfloat16):
                    torch.sub(old[name], tensor, out=tensor)
                    torch.sub(new[name], tensor, out=tensor)
                    continue
                # The difference of two float16 numbers may exceed the range of float16.
                limits = torch.finfo(tensor.dtype)
                taken = old[name].float() - tensor
                tensor.copy_((new[name].float() - taken).clamp_(limits.min, limits.max))


def _moved(start: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return ``start + new - old`` of integers or booleans as int64, clamped to the range of their dtype."""
    least, most = (0, 1) if start.dtype == torch.bool else (torch.iinfo(start.dtype).min, torch.iinfo(start.dtype).max)
    if start.dtype != torch.int64:
        return (start.long() + new.long() - old.long()).clamp_(least, most)
    # Overflow wraps around by 2^64. A double has the magnitude of the result, though not its last digits.
    moved, size = start + new - old, start.double() + new.double() - old.double()
    above = (size > 2.0**62) & ((moved < 0) | (size > 1.25 * 2.0**63))
    below = (size < -(2.0**62)) & ((moved >= 0) | (size < -1.25 * 2.0**63))
    return moved.masked_fill_(above, most).masked_fill_(below, least)
