"""Weighted means of tensors that come one by one, in the memory of one model."""

import random
from collections.abc import Iterator

import torch

from ...tensors import State
from ..base import Setup, Strategy, Update, change, narrow, wide

# Values that are worked on at a time: what is made of them on the way stays in the processor's cache.
_PART = 1 << 16
# From this share of the weight downwards, what rounding takes from a mean is kept: of so many steps, it adds up.
_SMALL_SHARE = 1 / 32
# What 8 bits count it in, as a part of the value itself: rounding to nearest takes at most 2^-24 of a float32.
_UNIT = 2.0**-31
_LEAST, _MOST = -128, 127
# By how much of a unit the rest of each step is rounded up, by turns: at random, but alike in every run.
_DICE = random.Random(0)  # noqa: S311 - no secret
_DITHER = tuple(_DICE.random() for _ in range(4096))


class Mean:
    """Mean of tensors of one shape, weighted. Only the ratios of the weights count, so no sum can overflow.

    m = m - (m - x) w / W, where W is the sum of the weights so far: a value that all tensors share comes back bit for
    bit. In float32 a step can be smaller than the rounding of m, where there are thousands of tensors, or one that
    weighs much more than the others. So small steps are compensated (Kahan, "Further Remarks on Reducing Truncation
    Errors", 1965): what rounding took from m is added to the next step. It is kept as an 8-bit part of m, rounded up or
    down at random (the same way in every run), which makes 32 bits of a float32's 24 in a quarter more of its memory.
    """

    def __init__(self, like: torch.Tensor) -> None:
        """A mean of tensors such as ``like``, in the precision of sums."""
        self._mean = torch.empty_like(like, dtype=wide(like.dtype), memory_format=torch.contiguous_format)
        self._rest: torch.Tensor | None = None
        self._compensates = False
        self._count = 0
        self.weight = 0.0
        """The sum of the weights so far."""

    def clear(self) -> None:
        """Begins anew. Memory is kept."""
        self._compensates, self._count, self.weight = False, 0, 0.0

    def add(self, parts: Iterator[tuple[slice, torch.Tensor]], weight: float) -> None:
        """Takes a tensor in, given as parts of its flat values."""
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
        """Multiplies the weights so far."""
        self.weight *= factor

    @property
    def value(self) -> torch.Tensor:
        """The mean, in the memory that the next round uses again."""
        return self._mean


class IntegerMean(Mean):
    """Mean of whole numbers: their weighted sum, divided at the end, so that a half is a half."""

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
    """Moves a mean by a share of the way to ``values``, in place. What it is too large by is ``rest`` units of it."""
    step = mean - values
    step.mul_(share).add_(rest.to(mean.dtype).mul_(mean), alpha=(1 - share) * _UNIT)
    moved = mean - step
    lost = step.sub_(mean.sub_(moved))
    mean.copy_(moved)
    # Not a number where the mean is 0: of that, any number of units is 0.
    rest.copy_(lost.div_(moved).mul_(1 / _UNIT).add_(dither).floor_().clamp_(_LEAST, _MOST))


class Averaging(Strategy):
    """Keeps the mean of each tensor of the updates, weighted by their numbers of examples.

    Floating-point tensors are averaged as they are, so that each value lies between those of the clients; of integers
    and booleans it is the changes that are averaged, and rounded.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._model: State = {}
        self._means: dict[str, Mean] = {}

    def begin(self, model: State) -> None:
        self._model = model
        self._means = means_of(model, self._means)

    def accept(self, update: Update) -> None:
        for name, mean in self._means.items():
            mean.add(self.averaged(update, name), update.weight)

    def averaged(self, update: Update, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """What of an update's tensor enters its mean, part by part."""
        new, old = update.tensors[name].reshape(-1), self._model[name].reshape(-1)
        for part in parts(len(new)):
            yield part, new[part] if new.is_floating_point() else change(new[part], old[part], torch.float64)

    def finish(self) -> State:
        return {name: self.mean(name) for name in self._model}

    def mean(self, name: str) -> torch.Tensor:
        """A tensor's mean over the clients, in the model's dtype."""
        return narrow(self._means[name].value, self._model[name])


def parts(count: int) -> Iterator[slice]:
    """Slices that cover so many values."""
    for start in range(0, count, _PART):
        yield slice(start, start + _PART)


def means_of(model: State, earlier: dict[str, Mean]) -> dict[str, Mean]:
    """An empty mean for every tensor of a model; in the memory of earlier ones where they fit."""
    if earlier.keys() != model.keys():
        return {name: Mean(like) if like.is_floating_point() else IntegerMean(like) for name, like in model.items()}
    for mean in earlier.values():
        mean.clear()
    return earlier
