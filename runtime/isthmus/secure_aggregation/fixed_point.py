"""Quantisation of one client's update for a secure sum, and the sums that come out."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from isthmus_contracts.pb import secure_aggregation_pb2 as pb

from ..codecs import Residual
from ..entropy import Entropy
from ..tensors import State, flat, wide
from .encoding import scalars
from .encoding.client_noise import Noise, add_count_noise, coordinate_noise
from .encoding.feedback import Feedback
from .encoding.projection import Projection
from .encoding.rounding import Rounding
from .encoding.scalars import SCALARS, Measured
from .layout import LayoutError, dtype_of, is_exact, levels, problem_with, projection, source, steps_of, unit, weight_of

__all__ = [
    "SCALARS", "Contribution", "Measured", "Quantised", "Sums", "dequantise", "mean_change", "quantisation_bound",
    "quantise",
]  # fmt: skip

Tensors = Mapping[str, torch.Tensor]
# Relative margin below the norm's bound, larger than all rounding errors of doubles when a change is scaled.
_SLACK = 1e-9
# Bound of the rounding errors of single precision in quantise and mean_change, relative to the clip.
_SINGLE = 2.0**-20


class UpdateError(ValueError):
    """An update cannot be contributed to a secure sum. ``str()`` gives the reason, in one line."""


@dataclass(frozen=True)
class Contribution:
    """Numbers of a client's update beside its tensors."""

    examples: int
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Numbers that the strategy requires: ``steps``, ``travel``."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the base model on the client's own data."""
    evaluation_examples: float = 0.0


@dataclass(frozen=True)
class Quantised:
    """Integers that a client contributes, and what was lost on the way."""

    tensors: State
    """As :func:`layout.wire_specs` describes them."""
    clipped: int
    """Number of coordinates whose change was larger than the layout's clip."""
    limited: tuple[str, ...]
    """Scalars that were beyond their bounds."""
    capped: bool
    """True if the client has more examples than the layout's largest weight."""
    unbounded: tuple[str, ...]
    """Metrics that the layout has no room for, so that they stay here."""
    residual: Residual | None = None
    """Values to add to the client's next change, once this one counts; only if the layout keeps some coordinates."""


def quantise(
    layout: pb.SecureLayout, base: State, trained: Tensors, contribution: Contribution,
    entropy: Entropy = os.urandom, noise: Noise | None = None, consume: bool = False, residual: Residual | None = None,
) -> Quantised:  # fmt: skip
    """Return a client's update as integers, of which a sum over any clients of the job stays within the ring.

    A coordinate is ``weight / largest weight * change / clip``, in units of ``1 / levels(layout)``, clipped to
    ``[-1, 1]`` and rounded stochastically, so without bias. Whole numbers are sent exactly. ``base``: the model that
    the client trained from. With a bound of the norm (differential privacy) the whole change is scaled down to it, and
    rounded toward zero, which cannot make it longer. ``noise``: added then; default: what the layout asks for.
    ``residual``: what the client left out in earlier rounds, if the layout keeps only some coordinates.
    ``consume``: take tensors out of ``base`` once they are not read again, and use their memory for the integers.
    Memory: that of the result, and a few blocks. Raises :class:`LayoutError` and :class:`UpdateError`.
    """
    if problem := problem_with(layout, base):
        raise LayoutError(problem)
    _check_rest(layout, base, trained)
    rounding, weight = Rounding(entropy), weight_of(layout, contribution.examples)
    noise = noise or coordinate_noise(layout)
    shrink = 1.0
    values = _values(layout, contribution)
    if layout.noise.clip_norm and layout.tensors:
        norm = _norm(layout, base, trained)
        values[scalars.LONG] = float(not norm <= layout.noise.clip_norm)
        shrink = min(1.0, layout.noise.clip_norm * (1 - _SLACK) / norm) if norm else 1.0
    result: State = {}
    clipped = 0
    left_out: Residual | None = None
    uses = Counter(map(source, layout.tensors))
    for tensor in layout.tensors:
        name = source(tensor)
        uses[name] -= 1
        out = _room(layout, tensor, base[name]) if consume and not uses[name] else None
        if out is None:
            out = torch.empty(list(tensor.shape), dtype=dtype_of(layout, tensor), device="cpu")
        new, old, target = flat(trained[name]), flat(base[name]), flat(out)
        if is_exact(tensor):
            clipped += _exact(tensor, new, old, target, weight)
        elif layout.noise.clip_norm:
            _truncated(layout, tensor, new, old, target, shrink, noise)
        else:
            share = weight / scalars.weight_bound(layout)
            factor = 1 / tensor.clip / _divisor(tensor, contribution)
            found = projection(layout, tensor, old.numel())
            feedback = None
            if found.leaves_out and tensor.divisor != "travel":
                left_out = left_out or Residual()
                feedback = Feedback(name, base[name].shape, residual, left_out)
            clipped += _rounded(
                tensor.name, found, new, old, target, factor, steps_of(layout, tensor) * share, rounding, feedback
            )
        result[tensor.name] = out
        if consume and not uses[name]:
            base.pop(name)
    values[scalars.CLIPPED] = float(clipped)
    result[SCALARS], limited = scalars.encode(layout, values, weight)
    add_count_noise(layout, result)
    known = scalars.metric_names(layout)
    unbounded = sorted({*contribution.metrics, *contribution.evaluation} - known)
    return Quantised(result, clipped, tuple(limited), bool(values[scalars.CAPPED]), tuple(unbounded), left_out)


def _room(layout: pb.SecureLayout, tensor: pb.SecureTensor, old: torch.Tensor) -> torch.Tensor | None:
    """Return the base tensor's memory as the masked tensor, if each integer takes the place of the value it is from."""
    dtype = dtype_of(layout, tensor)
    fits = old.element_size() == dtype.itemsize and old.is_floating_point() and old.is_contiguous()
    if not fits or not projection(layout, tensor, old.numel()).is_identity:
        return None
    return flat(old).view(dtype).view(list(tensor.shape))


def _values(layout: pb.SecureLayout, contribution: Contribution) -> dict[str, float]:
    capped = bool(layout.max_examples) and contribution.examples > layout.max_examples
    values = {scalars.EXAMPLES: 1.0, scalars.CAPPED: float(capped)}
    if scalars.STEPS in contribution.scalars:
        values[scalars.STEPS] = contribution.scalars[scalars.STEPS]
    return values | scalars.values_of(contribution.metrics, contribution.evaluation, contribution.evaluation_examples)


def _check_rest(layout: pb.SecureLayout, base: State, trained: Tensors) -> None:
    """Raise :class:`UpdateError` if a tensor has another form than the base's, or changed and does not travel."""
    travels = {source(tensor) for tensor in layout.tensors}
    if not travels:
        return
    for name, old in base.items():
        new = trained.get(name)
        if new is None or new.shape != old.shape or new.dtype != old.dtype:
            raise UpdateError(f"{name}: the trained tensor has another shape or dtype than the global model's")
        if name in travels or layout.noise.clip_norm:
            continue
        if not torch.equal(flat(new).view(torch.uint8), flat(old).view(torch.uint8)):
            raise UpdateError(
                f"{name} required no gradient when training began, and has changed since: with secure aggregation what"
                " is frozen stays frozen; unfreeze it before the first round"
            )


def _divisor(tensor: pb.SecureTensor, contribution: Contribution) -> float:
    if not tensor.divisor:
        return 1.0
    number = contribution.scalars.get(tensor.divisor, 0.0)
    if not number > 0:
        raise UpdateError(f"the strategy needs the number of {tensor.divisor} above 0, not {number}")
    return number


def _rounded(
    name: str, found: Projection, new: torch.Tensor, old: torch.Tensor, target: torch.Tensor, factor: float,
    scale: float, rounding: Rounding, feedback: Feedback | None,
) -> int:  # fmt: skip
    """Quantise one tensor; return the number of clipped coordinates."""
    dtype = wide(old.dtype)
    scale = _down(scale, dtype)
    clipped = 0
    for part in found.parts():
        after, before = new[part.values], old[part.values]
        change = after.sub(before) if after.dtype == dtype else after.to(dtype, copy=True).sub_(before)
        if feedback is None:
            coordinates = found.forward(part, change.mul_(factor))
        else:
            feedback.add(part, change)
            coordinates = found.forward(part, change.clone())
            feedback.keep(part, change.sub_(found.backward(part, coordinates)))
            coordinates.mul_(factor)
        least, most = coordinates.aminmax()
        if not (least >= -1 and most <= 1):  # NaN is not
            if not bool(after.isfinite().all()) or bool(coordinates.isnan().any()):
                raise UpdateError(f"{name} holds NaN or infinity")
            clipped += int((coordinates.abs() > 1).sum())
            coordinates.clamp_(-1, 1)
        target[part.coordinates] = rounding.round(coordinates.mul_(scale))
    return clipped


def _down(number: float, dtype: torch.dtype) -> float:
    """Return the largest number of a precision that is not above ``number``, so that no product exceeds it."""
    if dtype == torch.float64:
        return number
    single = np.float32(number)
    return float(single if float(single) <= number else np.nextafter(single, np.float32(0)))


def _exact(tensor: pb.SecureTensor, new: torch.Tensor, old: torch.Tensor, target: torch.Tensor, weight: int) -> int:
    change = torch.sub(new.to(torch.int64), old.to(torch.int64), out=target)
    most = int(tensor.clip)
    outside = int((change.abs() > most).sum())
    change.clamp_(-most, most).mul_(weight)
    return outside


def _truncated(
    layout: pb.SecureLayout, tensor: pb.SecureTensor, new: torch.Tensor, old: torch.Tensor, target: torch.Tensor,
    shrink: float, noise: Noise | None,
) -> None:  # fmt: skip
    steps = levels(layout) / layout.noise.clip_norm * shrink
    for part in projection(layout, tensor, old.numel()).parts():
        change = new[part.values].to(torch.float64, copy=True).sub_(old[part.values])
        numbers = change.mul_(steps).trunc_().to(torch.int64)
        if noise is not None:
            noise(tensor.name, numbers)
        target[part.coordinates] = numbers


def _norm(layout: pb.SecureLayout, base: State, trained: Tensors) -> float:
    """Return the L2 norm of a client's change. Raises :class:`UpdateError` if it is not finite."""
    squares = 0.0
    for tensor in layout.tensors:
        new, old = flat(trained[source(tensor)]), flat(base[source(tensor)])
        for part in projection(layout, tensor, old.numel()).parts():
            change = new[part.values].to(torch.float64, copy=True).sub_(old[part.values])
            squares += float(change.square_().sum())
    if not np.isfinite(squares):
        raise UpdateError("the update holds NaN, infinity, or changes that are too large")
    return float(np.sqrt(squares))


@dataclass(frozen=True)
class Sums:
    """Opened sums of one round's scalars."""

    contributors: int
    scalars: Mapping[str, float]
    """Sums by the scalar's name."""
    weight: float
    """Sum of the clients' weights."""
    metrics: Mapping[str, Measured]
    """Metrics of training."""
    evaluation: Mapping[str, Measured]
    """Metrics of the base model."""
    clipped_share: float
    """Share of all clients' coordinates that were clipped. Under differential privacy whole changes are scaled down
    instead; the scalar ``long`` counts them."""
    capped: int
    """Number of clients that have more examples than the largest weight."""
    limited: int
    """Number of scalars that were beyond their bounds, over all clients."""
    implausible: tuple[str, ...]
    """Scalars whose sums bounded values cannot have: a client did not send what the layout asks for."""


def dequantise(layout: pb.SecureLayout, total: State, contributors: int) -> Sums:
    """Return the sums of the scalars of an opened vector; :func:`mean_change` returns those of tensors."""
    sums = scalars.decode(layout, total[SCALARS])
    coordinates = sum(total[tensor.name].numel() for tensor in layout.tensors)
    share = sums.get(scalars.CLIPPED, 0.0) / max(coordinates * contributors, 1)
    return Sums(
        contributors=contributors, scalars=sums, weight=sums.get(scalars.EXAMPLES, 0.0),
        metrics=scalars.measured(sums, evaluation=False), evaluation=scalars.measured(sums, evaluation=True),
        clipped_share=share, capped=int(sums.get(scalars.CAPPED, 0.0)), limited=int(sums.get(scalars.LIMITED, 0.0)),
        implausible=tuple(scalars.implausible(layout, sums, contributors)),
    )  # fmt: skip


def moved(
    layout: pb.SecureLayout, tensor: pb.SecureTensor, total: torch.Tensor, old: torch.Tensor, weight: float,
    factor: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """Return a model's tensor plus the weighted mean of the clients' changes, times ``factor``.

    The result is in the precision of sums, or of the model's own type for integers and booleans, whose mean change is
    rounded. A coordinate that no client changed keeps its value bit for bit.
    """
    if is_exact(tensor):
        change = total.view(old.shape).to(torch.float64).div_(weight).round_().to(torch.int64)
        return change.add_(old).to(old.dtype)
    result = torch.empty(old.shape, dtype=wide(old.dtype), device="cpu")
    values, before = flat(result), flat(old)
    found = projection(layout, tensor, old.numel())
    scale = unit(layout, tensor) / weight * factor
    summed = flat(total)
    for part in found.parts():
        # Negated as integers, and subtracted: 0 - 0.0 and -0.0 - 0.0 are what they were.
        coordinates = summed[part.coordinates].neg().to(result.dtype).mul_(scale)
        torch.sub(before[part.values], found.backward(part, coordinates), out=values[part.values])
    return result


def mean_change(
    layout: pb.SecureLayout, tensor: pb.SecureTensor, total: torch.Tensor, old: torch.Tensor, weight: float
) -> torch.Tensor:
    """Return the weighted mean of the clients' changes of a floating-point tensor, in the precision of sums."""
    zeros = torch.zeros((), dtype=old.dtype, device="cpu").expand(old.shape)
    return moved(layout, tensor, total, zeros, weight)


def quantisation_bound(layout: pb.SecureLayout, contributors: int, weight: float) -> dict[str, float]:
    """Return the largest possible error of the weighted mean of each masked tensor's coordinates.

    ``weight``: sum of the clients' weights. Each client's coordinate is rounded to a neighbouring step, of
    ``layout.unit``; so ``contributors * unit / weight``, plus the rounding errors of single precision. It holds for
    changes that are not clipped and coordinates that are kept, before the model's own dtype rounds them. The typical
    error is far smaller: rounding is unbiased, so its standard deviation is at most
    ``sqrt(contributors) / 2 * unit / weight``. After a rotation of blocks of 1,024, a single value may collect the
    errors of its whole block, and the bound is 32 times as large. Whole numbers have no error.
    """
    bounds = {}
    for tensor in layout.tensors:
        spread = 1.0
        if layout.rotate and not is_exact(tensor):
            spread = 32.0
        step = 0.0 if is_exact(tensor) else contributors * unit(layout, tensor) / weight + _SINGLE * tensor.clip
        bounds[tensor.name] = spread * step
    return bounds
