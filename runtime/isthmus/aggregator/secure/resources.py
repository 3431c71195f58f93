"""Memory and threads of steps that touch all of a model."""

import os

from ...tensors import State
from ..storage.checkpoints import Checkpoint
from ..storage.safetensors_file import SMALL_BYTES, mapped

# Threads that remove masks: they share the memory's bandwidth.
_MOST_THREADS = 8


def for_hashing(checkpoint: Checkpoint) -> State:
    """Return a model's tensors. A large model is mapped for this alone, so that its pages are released afterwards."""
    file = checkpoint.file
    return mapped(file.path) if file.size > SMALL_BYTES else checkpoint.state


def threads() -> int:
    """Return the number of threads that remove masks."""
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0))))
