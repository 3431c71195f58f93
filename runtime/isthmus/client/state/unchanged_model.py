"""Detection of scripts that train something other than the submitted model, such as a copy of it."""

import logging
from collections.abc import Mapping

import torch

log = logging.getLogger("isthmus")

_SAMPLED = 64


class UnchangedModelCheck:
    """Comparison of the submitted weights with those at the start of the round, with one warning if they are equal.

    Instead of a copy of the model it keeps a few values of each tensor, and torch's count of in-place changes.
    """

    def __init__(self) -> None:
        self._warned = False
        self._before: dict[str, tuple[int, torch.Tensor]] = {}

    def begin(self, live: Mapping[str, torch.Tensor]) -> None:
        """Record the weights at the start of a round."""
        self._before = {} if self._warned else {name: _mark(tensor) for name, tensor in live.items()}

    def compare(self, live: Mapping[str, torch.Tensor], round_number: int) -> None:
        """Warn if none of the weights has changed since."""
        before, self._before = self._before, {}
        if before and before.keys() == live.keys() and all(_same(before[name], live[name]) for name in before):
            self._warned = True
            log.warning(
                "round %d: the update equals the global model: the model passed to isthmus.rounds() has not changed;"
                " if the script trained a copy of it, train the model itself, or load the result"
                " into it before rnd.submit()",
                round_number,
            )


def _mark(tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
    with torch.no_grad():
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
        step = max(1, flat.numel() // _SAMPLED)
        return _version(tensor), flat[::step][:_SAMPLED].to("cpu", copy=True)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # not counted in inference mode


def _same(before: tuple[int, torch.Tensor], tensor: torch.Tensor) -> bool:
    if before[0] != _version(tensor):
        return False
    return torch.equal(_mark(tensor)[1], before[1])
