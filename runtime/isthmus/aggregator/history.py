"""The global models that updates on their way may have begun with, and what becomes of an update from an older one."""

from collections.abc import Collection

import torch

from ..tensors import State
from .checkpoints import Checkpoint, CheckpointStore


class History:
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


def rebase(tensors: State, old: State, new: State, buffers: Collection[str]) -> None:
    """Makes an update that began with ``old`` one that begins with ``new``, by the same change; in place.

    What no optimizer trains stays as the client has it.
    """
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or name in buffers:
                continue
            if tensor.dtype not in (torch.float16, torch.bfloat16):
                tensor.sub_(old[name]).add_(new[name])
                continue
            # The difference of two numbers that float16 can hold may be one that it cannot.
            limits = torch.finfo(tensor.dtype)
            tensor.copy_(tensor.float().sub_(old[name]).add_(new[name]).clamp_(limits.min, limits.max))
