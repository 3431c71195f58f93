"""The global models that updates on their way may have begun with, and what becomes of an update from an older one."""

from collections.abc import Collection

import torch

from ...tensors import State
from ..storage.checkpoints import Checkpoint, CheckpointStore


class BaseModels:
    """The newest ``depth`` committed models, of which the older ones are only needed where late updates count.

    Large ones are backed by their files: they take memory only where they are touched.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._models: dict[int, Checkpoint] = {}

    def restore(self, store: CheckpointStore, newest: int) -> None:
        """Takes up what an earlier process committed, as far as it can be read. Blocks."""
        for number in store.numbers():
            if newest - self._depth < number < newest:
                self.add(store.load(number))

    def add(self, checkpoint: Checkpoint) -> None:
        """Takes a new model in, and lets the oldest go."""
        self._models[checkpoint.round] = checkpoint
        for number in [number for number in self._models if number <= checkpoint.round - self._depth]:
            del self._models[number]

    def find(self, number: int, digest: str) -> State | None:
        """The model of a round, if it is the one of that digest and still there."""
        checkpoint = self._models.get(number)
        return checkpoint.state if checkpoint is not None and checkpoint.digest == digest else None


def rebase(tensors: State, old: State, new: State, buffers: Collection[str], weights: bool = True) -> None:
    """Makes an update that began with ``old`` one that begins with ``new``, by the same change; in place.

    Statistics, which ``buffers`` names, stay as the client has them; integers and booleans (counters) do not, or they
    would take the model's back. ``weights``: whether weights are rebased.
    """
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                tensor.copy_(_moved(new[name], old[name], tensor))
            elif weights and name not in buffers:
                # By what was taken from the old one: where that is nothing, the new one comes back bit for bit.
                if tensor.dtype not in (torch.float16, torch.bfloat16):
                    torch.sub(old[name], tensor, out=tensor)
                    torch.sub(new[name], tensor, out=tensor)
                    continue
                # The difference of two numbers that float16 can hold may be one that it cannot.
                limits = torch.finfo(tensor.dtype)
                taken = old[name].float() - tensor
                tensor.copy_((new[name].float() - taken).clamp_(limits.min, limits.max))


def _moved(start: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Integers or booleans, moved as ``old`` became ``new``, as int64 within what their dtype holds."""
    least, most = (0, 1) if start.dtype == torch.bool else (torch.iinfo(start.dtype).min, torch.iinfo(start.dtype).max)
    if start.dtype != torch.int64:
        return (start.long() + new.long() - old.long()).clamp_(least, most)
    # Overflow goes round by 2^64: a double has the size of the number, if not its last digits.
    moved, size = start + new - old, start.double() + new.double() - old.double()
    above = (size > 2.0**62) & ((moved < 0) | (size > 1.25 * 2.0**63))
    below = (size < -(2.0**62)) & ((moved >= 0) | (size < -1.25 * 2.0**63))
    return moved.masked_fill_(above, most).masked_fill_(below, least)
