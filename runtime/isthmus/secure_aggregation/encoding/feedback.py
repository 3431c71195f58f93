"""Error feedback of masked updates that keep only some coordinates."""

import torch

from ...codecs import Residual
from .projection import Part


class Feedback:
    """Values of one tensor that earlier rounds left out, and those that this round leaves out.

    The residual of an update becomes the client's once the update is part of a committed sum; an update that is lost
    leaves it as it was (Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes",
    2019, algorithm 2).
    """

    def __init__(self, name: str, shape: torch.Size, earlier: Residual | None, later: Residual) -> None:
        """``later`` takes what this round leaves out."""
        self._name, self._shape, self._earlier, self._later = name, shape, earlier, later
        later.begin(name, shape)

    def add(self, part: Part, change: torch.Tensor) -> None:
        """Add what earlier rounds left out to the change of a part, in place."""
        if self._earlier is None:
            return
        start, count = part.values.start, part.values.stop - part.values.start
        if (values := self._earlier.read(self._name, self._shape, start, count)) is not None:
            change.add_(values)

    def keep(self, part: Part, rest: torch.Tensor) -> None:
        """Keep what this round leaves out of a part."""
        self._later.write(self._name, part.values.start, rest.float())
