"""Finds out that a script has trained something else than the model that it hands in, such as a copy of it."""

import logging
from collections.abc import Mapping

import torch

log = logging.getLogger("isthmus")

_SAMPLED = 64


class Untouched:
    """Compares the weights that are handed in with those that the round began with, and warns once.

    Keeps a few values of each tensor, and how often torch has changed it in place, rather than a copy of the model.
    """

    def __init__(self) -> None:
        self._warned = False
        self._before: dict[str, tuple[int, torch.Tensor]] = {}

    def begin(self, live: Mapping[str, torch.Tensor]) -> None:
        """Note the weights that a round begins with."""
        self._before = {} if self._warned else {name: _mark(tensor) for name, tensor in live.items()}

    def compare(self, live: Mapping[str, torch.Tensor], round_number: int) -> None:
        """Warn where none of the weights has changed since."""
        before, self._before = self._before, {}
        if before and before.keys() == live.keys() and all(_same(before[name], live[name]) for name in before):
            self._warned = True
            log.warning(
                "round %d: the update equals the global model: nothing has changed the model that was given to"
                " isthmus.rounds(); if the script trained a copy of it, train the model itself, or load the result"
                " into it before rnd.submit()",
                round_number,
            )


def _mark(tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
    with torch.no_grad():
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
        step = max(1, flat.numel() // _SAMPLED)
        return _version(tensor), flat[::step][:_SAMPLED].to("cpu", copy=True)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # which is not counted in inference mode


def _same(before: tuple[int, torch.Tensor], tensor: torch.Tensor) -> bool:
    if before[0] != _version(tensor):
        return False
    return torch.equal(_mark(tensor)[1], before[1])
