"""Weighted means of tensors that arrive one by one, in the memory of one model."""

import random
from collections.abc import Iterator

import torch

from ...tensors import State, wide
from ..base import Setup, Strategy, Update, change, narrow

# Values processed at a time, so that intermediate results stay in the processor's cache.
_PART = 1 << 16
# For steps of at most this share of the weight, the rounding error is compensated: over many steps it adds up.
_SMALL_SHARE = 1 / 32
# Unit of the 8-bit compensation, relative to the value: rounding to nearest loses at most 2^-24 of a float32.
_UNIT = 2.0**-31
_LEAST, _MOST = -128, 127
# Fractions of a unit for stochastic rounding of the compensation: random, but the same in every run.
_DICE = random.Random(0)  # noqa: S311 - not a secret
_DITHER = tuple(_DICE.random() for _ in range(4096))


class Mean:
    """Weighted mean of tensors of one shape. Only the ratios of the weights count, so no sum can overflow.

    m = m - (m - x) w / W, where W is the sum of the weights so far: a value that all tensors share is preserved bit for
    bit. In float32 a step can be smaller than the rounding error of m, with thousands of tensors or with one that
    weighs much more than the others. So small steps are compensated (Kahan, "Further Remarks on Reducing Truncation
    Errors", 1965): the rounding error of m is added to the next step. It is stored as an 8-bit fraction of m, with
    stochastic rounding (the same in every run), which extends a float32's 24 bits to 32 with a quarter more memory.
    """

    def __init__(self, like: torch.Tensor) -> None:
        """Make a mean of tensors of the shape and dtype of ``like``, in the precision of sums."""
        self._mean = torch.empty_like(like, dtype=wide(like.dtype), memory_format=torch.contiguous_format)
        self._rest: torch.Tensor | None = None
        self._compensates = False
        self._count = 0
        self.weight = 0.0
        """Sum of the weights so far."""

    def clear(self) -> None:
        """Reset the mean; its memory is kept."""
        self._compensates, self._count, self.weight = False, 0, 0.0

    def add(self, parts: Iterator[tuple[slice, torch.Tensor]], weight: float) -> None:
        """Add a tensor, given as parts of its flat values."""
        total = self.weight + weight
        share = weight / total
        if share < _SMALL_SHARE and not self._compensates and self._mean.dtype == torch.float32:
            self._compensates = True
            if self._rest is None:
                self._rest = torch.empty(self._mean.numel(), dtype=torch.int8, device="cpu")
            self._rest.zero_()
        if share > 0.5:
            self._compensates = False
        flat = self._mean.view(-1)
        for part, values in parts:
            if share == 1:
                flat[part] = values
            elif share > 0.5:
                away = values - flat[part]
                torch.sub(values, away, alpha=1 - share, out=flat[part])
            elif self._compensates:
                assert self._rest is not None
                _step(flat[part], self._rest[part], values, share, _DITHER[self._count % len(_DITHER)])
            else:
                flat[part].sub_(flat[part] - values, alpha=share)
        self.weight = total
        self._count += 1

    def scale(self, factor: float) -> None:
        """Multiply the weights so far."""
        self.weight *= factor

    @property
    def value(self) -> torch.Tensor:
        """Mean, in memory that the next round reuses."""
        return self._mean


class IntegerMean(Mean):
    """Mean of whole numbers: the weighted sum is divided at the end, so that halves are exact."""

    def add(self, parts: Iterator[tuple[slice, torch.Tensor]], weight: float) -> None:
        flat = self._mean.view(-1)
        if not self.weight:
            flat.zero_()
        for part, values in parts:
            flat[part].add_(values, alpha=weight)
        self.weight += weight

    @property
    def value(self) -> torch.Tensor:
        return self._mean / self.weight


def _step(mean: torch.Tensor, rest: torch.Tensor, values: torch.Tensor, share: float, dither: float) -> None:
    """Move a mean by a share of the way to ``values``, in place. ``rest``: its excess, in units of itself."""
    step = mean - values
    step.mul_(share).add_(rest.to(mean.dtype).mul_(mean), alpha=(1 - share) * _UNIT)
    moved = mean - step
    lost = step.sub_(mean.sub_(moved))
    mean.copy_(moved)
    # NaN if the mean is 0; any number of units of 0 is 0.
    rest.copy_(lost.div_(moved).mul_(1 / _UNIT).add_(dither).floor_().clamp_(_LEAST, _MOST))


class Averaging(Strategy):
    """Mean of each tensor over the updates, weighted by their numbers of examples.

    Floating-point tensors are averaged themselves, so that each value lies between those of the clients. For integers
    and booleans the changes are averaged, and rounded.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._model: State = {}
        self._means: dict[str, Mean] = {}

    def begin(self, model: State) -> None:
        self._model = model
        self._means = means_of(model, self._means)

    def release(self) -> None:
        self._means, self._model = {}, {}

    def accept(self, update: Update) -> None:
        for name, mean in self._means.items():
            mean.add(self.averaged(update, name), update.weight)

    def averaged(self, update: Update, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the values of an update's tensor that enter its mean, part by part."""
        new, old = update.tensors[name].reshape(-1), self._model[name].reshape(-1)
        for part in parts(len(new)):
            yield part, new[part] if new.is_floating_point() else change(new[part], old[part], torch.float64)

    def finish(self) -> State:
        return {name: self.mean(name) for name in self._model}

    def mean(self, name: str) -> torch.Tensor:
        """Return a tensor's mean over the clients, in the model's dtype."""
        return narrow(self._means[name].value, self._model[name])


def parts(count: int) -> Iterator[slice]:
    """Yield slices that together cover ``count`` values."""
    for start in range(0, count, _PART):
        yield slice(start, start + _PART)


def means_of(model: State, earlier: dict[str, Mean]) -> dict[str, Mean]:
    """Return an empty mean for every tensor of a model, in the memory of the earlier ones if they fit."""
    if earlier.keys() != model.keys():
        return {name: Mean(like) if like.is_floating_point() else IntegerMean(like) for name, like in model.items()}
    for mean in earlier.values():
        mean.clear()
    return earlier
