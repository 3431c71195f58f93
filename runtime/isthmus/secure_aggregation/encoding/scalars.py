"""Numbers of a client as bounded fixed-point coordinates, which are summed modulo 2^64 in one tensor."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch

from isthmus_contracts.pb import secure_aggregation_pb2 as pb

SCALARS = "isthmus.scalars"
"""Name of the tensor of all scalars in a masked update: int64, one dimension, in the order of the layout."""
EXAMPLES = "examples"
CLIPPED = "clipped"
CAPPED = "capped"
LIMITED = "limited"
LONG = "long"
STEPS = "steps"
MOST_STEPS = 1e6
"""Largest number of local steps of one client that FedNova counts under secure aggregation."""
_KNOWN = frozenset({EXAMPLES, CLIPPED, CAPPED, LIMITED, LONG, STEPS})
# A metric's name may hold dots, but no colon.
_METRIC, _EVALUATION, _WEIGHT = "metric.", "evaluation.", ":examples"
_MOST_FRACTION_BITS = 40
# Standard deviations within which noise is plausible.
_DEVIATIONS = 12.0
# Binary logarithm of the bound of a sum. The other half of the ring is for the rounding of each summand.
_SUM_BITS = 62


class LayoutError(ValueError):
    """A layout does not fit. ``str()`` gives the reason, in one line."""


@dataclass(frozen=True)
class Measured:
    """Sum of a metric over clients: the mean, and the number of examples of those that reported it."""

    mean: float
    examples: float


def common(coordinates: int, *, weighted: bool) -> list[pb.SecureScalar]:
    """Return the scalars of every training layout.

    ``coordinates``: number of coordinates that may be clipped. ``weighted``: clients count by their examples.
    """
    scalars = [pb.SecureScalar(name=EXAMPLES, least=0, most=1, weighted=weighted)]
    for name, most in ((CLIPPED, max(coordinates, 1)), (CAPPED, 1), (LIMITED, 1 << 16), (LONG, 1)):
        scalars.append(pb.SecureScalar(name=name, least=0, most=most))
    return scalars


def of_training(bounds: Mapping[str, float], *, weighted: bool) -> list[pb.SecureScalar]:
    """Return the scalars of the metrics of training. ``bounds``: largest absolute values, by the metric's name."""
    scalars = []
    for name, bound in sorted(bounds.items()):
        scalars.append(pb.SecureScalar(name=_METRIC + name, least=-bound, most=bound, weighted=weighted))
        scalars.append(pb.SecureScalar(name=_METRIC + name + _WEIGHT, least=0, most=1, weighted=weighted))
    return scalars


def of_evaluation(bounds: Mapping[str, float], most_examples: float) -> list[pb.SecureScalar]:
    """Return the scalars of the metrics of an evaluation, which has examples of its own."""
    scalars = []
    for name, bound in sorted(bounds.items()):
        most = bound * most_examples
        scalars.append(pb.SecureScalar(name=_EVALUATION + name, least=-most, most=most))
        scalars.append(pb.SecureScalar(name=_EVALUATION + name + _WEIGHT, least=0, most=most_examples))
    return scalars


def values_of(metrics: Mapping[str, float], evaluation: Mapping[str, float], examples: float) -> dict[str, float]:
    """Return the values of a client's metrics, by the scalars' names.

    ``examples``: number of those that ``evaluation`` was measured on, which may be a fraction. Values that are not
    finite, and evaluations of no examples, are left out.
    """
    values: dict[str, float] = {}
    for name, value in metrics.items():
        if math.isfinite(value):
            values[_METRIC + name], values[_METRIC + name + _WEIGHT] = value, 1.0
    for name, value in evaluation.items():
        if examples > 0 and math.isfinite(examples) and math.isfinite(value * examples):
            values[_EVALUATION + name], values[_EVALUATION + name + _WEIGHT] = value * examples, examples
    return values


def encode(layout: pb.SecureLayout, values: Mapping[str, float], weight: int) -> tuple[torch.Tensor, list[str]]:
    """Return a client's scalars as integers, and the names of those that were beyond their bounds.

    Scalars of the layout without a value are 0. ``weight``: the client's, for scalars that are weighted.
    """
    limited: list[str] = []
    numbers: dict[str, int] = {}
    for scalar in layout.scalars:
        value = values.get(scalar.name, 0.0)
        held = min(max(value, scalar.least), scalar.most)
        if held != value:
            limited.append(scalar.name)
        factor = weight if scalar.weighted else 1
        numbers[scalar.name] = round(Fraction(held) * factor * (1 << fraction_bits(layout, scalar)))
    if LIMITED in numbers:
        bits = next(fraction_bits(layout, scalar) for scalar in layout.scalars if scalar.name == LIMITED)
        numbers[LIMITED] = len(limited) << bits
    return torch.tensor(list(numbers.values()), dtype=torch.int64, device="cpu"), limited


def decode(layout: pb.SecureLayout, sums: torch.Tensor) -> dict[str, float]:
    """Return the sums of scalars, by name."""
    return {
        scalar.name: float(Fraction(number, 1 << fraction_bits(layout, scalar)))
        for scalar, number in zip(layout.scalars, sums.tolist(), strict=True)
    }


def implausible(layout: pb.SecureLayout, sums: Mapping[str, float], contributors: int) -> list[str]:
    """Return the names of the sums that bounded values of this number of clients cannot have."""
    found = []
    for scalar in layout.scalars:
        most = contributors * weight_bound(layout) if scalar.weighted else contributors
        room = 2.0 ** -fraction_bits(layout, scalar) * contributors
        if scalar.name == LONG and layout.noise.count_noise:
            room += _DEVIATIONS * layout.noise.count_noise * math.sqrt(contributors / layout.noise.contributors)
        if not min(scalar.least, 0) * most - room <= sums[scalar.name] <= max(scalar.most, 0) * most + room:
            found.append(scalar.name)
    return found


def measured(sums: Mapping[str, float], *, evaluation: bool) -> dict[str, Measured]:
    """Return the metrics that at least one client reported, of training or of the evaluation of the base model."""
    prefix = _EVALUATION if evaluation else _METRIC
    found = {}
    for key, total in sums.items():
        if key.startswith(prefix) and not key.endswith(_WEIGHT) and (examples := sums.get(key + _WEIGHT, 0.0)) > 0:
            found[key.removeprefix(prefix)] = Measured(total / examples, examples)
    return found


def metric_names(layout: pb.SecureLayout) -> frozenset[str]:
    """Return the names of the metrics that a layout has room for."""
    names = (scalar.name for scalar in layout.scalars if not scalar.name.endswith(_WEIGHT))
    return frozenset(
        name.removeprefix(prefix) for name in names for prefix in (_METRIC, _EVALUATION) if name.startswith(prefix)
    )


def weight_bound(layout: pb.SecureLayout) -> int:
    """Return the largest weight of one client."""
    return max(int(layout.max_examples), 1)


def fraction_bits(layout: pb.SecureLayout, scalar: pb.SecureScalar) -> int:
    """Return the number of fractional bits of a scalar. Raises :class:`LayoutError` if its sum may leave the ring.

    It depends on public bounds only: the clients' values times their weights, over as many clients as the job may
    have, stay below 2^62 in size. Rounding adds at most 1/2 for each client, and whole numbers need none.
    """
    bound = max(abs(scalar.least), abs(scalar.most)) * layout.max_clients
    if scalar.weighted:
        bound *= weight_bound(layout)
    if not math.isfinite(bound):
        raise LayoutError(f"the scalar {scalar.name} has no finite bounds")
    bits = min(_SUM_BITS - math.frexp(bound)[1], _MOST_FRACTION_BITS)
    if bits < 0:
        raise LayoutError(
            f"the scalar {scalar.name} may be as large as {bound:.3g} in a sum, which does not fit 63 bits: lower"
            " privacy.secureAggregation.maxExamples or the metric's bound"
        )
    return bits


def check(scalars: Iterable[pb.SecureScalar]) -> str | None:
    """Return the problem with the scalars of a received layout, or ``None``."""
    seen: set[str] = set()
    for scalar in scalars:
        if scalar.name in seen:
            return f"the scalar {scalar.name} occurs twice"
        seen.add(scalar.name)
        if scalar.name not in _KNOWN and not scalar.name.startswith((_METRIC, _EVALUATION)):
            return f"the scalar {scalar.name} is not known"
        if not scalar.least <= 0 <= scalar.most:  # also refuses NaN
            return f"the range of {scalar.name} does not contain 0"
    return None
