"""Layout of a round: which integers every client sends, and the bounds that keep their sum within the ring."""

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from isthmus_contracts.dp_skellam import Grid, grid_of
from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.pb.federation_pb2 import TensorSpec

from ..tensors import GREATEST_WEIGHT, State
from .encoding import scalars
from .encoding.history import FIRST_BUFFER_CLIP, FIRST_CLIP, FIRST_SLOPE, History
from .encoding.projection import Projection, every_of
from .encoding.scalars import SCALARS, LayoutError

if TYPE_CHECKING:
    # Clients import this module, and need no manifests.
    from isthmus_contracts.api.federated_job import FederatedJobSpec

__all__ = ["History", "LayoutError", "Parameters", "make_layout", "public_seed"]

SLOPE = "slope/"
"""Prefix of the masked tensors with SCAFFOLD's changes divided by the travel."""
EXACT_BITS = 64
# In 16 bits they are too coarse: every step of the next round repeats the error (digits: 1.7 points of accuracy).
_SLOPE_BITS = 32
_DTYPES = {16: torch.int16, 32: torch.int32, 64: torch.int64}
# Numbers of a client that may divide its change.
_DIVISORS = ("steps", "travel")
# Largest clipping norm, noise multiplier, and noise of a count.
_MOST_NOISE = 1e12
# A double holds all whole numbers up to here.
_MOST_EXACT = 2**53


@dataclass(frozen=True)
class Parameters:
    """Settings of a job that its layouts depend on."""

    algorithm: str = "FedAvg"
    bits: int = 32
    max_clients: int = 3
    """Number of clients whose sum must fit the ring: all that may ever train in the job, not those of a round."""
    max_examples: int = 1_000_000
    clip: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Largest absolute value of each metric, by name."""
    rotation: bool = False
    keep: float = 0.0
    """Share of coordinates that are sent; 0: all."""
    clip_norm: float = 0.0
    """Longest change of one client under differential privacy (L2, over all tensors); 0: no differential privacy."""

    @classmethod
    def of(cls, spec: "FederatedJobSpec") -> "Parameters":
        """Return the parameters of a job with secure aggregation."""
        secure, private = spec.privacy.secure_aggregation, spec.privacy.differential_privacy
        assert secure is not None
        return cls(
            spec.strategy.algorithm, secure.bits, spec.most_trainers, secure.max_examples,
            None if secure.clip is None else float(secure.clip),
            {name: float(bound) for name, bound in secure.metrics.items()}, secure.rotation, float(secure.keep or 0),
            0.0 if private is None else float(private.clip_norm),
        )  # fmt: skip


def public_seed(job_uid: str, round_number: int) -> bytes:
    """Return the seed of a round's rotation and choice of coordinates, which need not be secret."""
    return hashlib.sha256(f"isthmus layout {job_uid} {round_number}".encode()).digest()


def make_layout(
    parameters: Parameters, model: State, buffers: Collection[str] = (), frozen: Collection[str] = (),
    history: History | None = None, seed: bytes = b"", noise: pb.SecureNoise | None = None,
) -> pb.SecureLayout:  # fmt: skip
    """Return the layout of a round, a function of the manifest, the model's shapes, and public results.

    ``buffers``: tensors that no optimizer trains. ``frozen``: tensors that no client changes; they do not travel. Under
    differential privacy buffers, integers and booleans do not travel either: they keep the model's values.
    ``noise``: what clients add to their own coordinates, and the bound of their changes in this round, if it is not the
    manifest's. Raises :class:`LayoutError`.
    """
    history = history or History()
    weighted = not parameters.clip_norm
    largest = min(history.weight or math.inf, parameters.max_examples) if weighted else 0
    layout = pb.SecureLayout(bits=parameters.bits, max_clients=parameters.max_clients, max_examples=largest)
    if weighted:
        layout.rotate, layout.keep_fraction, layout.public_seed = parameters.rotation, parameters.keep, seed
    else:
        layout.noise.CopyFrom(noise or pb.SecureNoise())
        layout.noise.clip_norm = layout.noise.clip_norm or parameters.clip_norm
    for tensor in _tensors(parameters, layout, model, buffers, frozen, history):
        layout.tensors.append(tensor)
    if clash := next((name for name in model if name.startswith(SLOPE) or name == SCALARS), None):
        raise LayoutError(f"{clash}: secure aggregation needs this name itself; rename the module")
    coordinates = sum(math.prod(tensor.shape) for tensor in layout.tensors)
    layout.scalars.extend(scalars.common(coordinates, weighted=weighted))
    if parameters.algorithm == "FedNova":
        layout.scalars.append(pb.SecureScalar(name=scalars.STEPS, least=0, most=scalars.MOST_STEPS, weighted=weighted))
    layout.scalars.extend(scalars.of_training(parameters.metrics, weighted=weighted))
    layout.scalars.extend(scalars.of_evaluation(parameters.metrics, parameters.max_examples))
    for scalar in layout.scalars:
        scalars.fraction_bits(layout, scalar)
    levels(layout)
    return layout


def evaluation_layout(parameters: Parameters) -> pb.SecureLayout:
    """Return the layout of an instance that only evaluates the final model."""
    layout = pb.SecureLayout(bits=parameters.bits, max_clients=parameters.max_clients)
    layout.scalars.extend(scalars.of_evaluation(parameters.metrics, parameters.max_examples))
    layout.scalars.append(pb.SecureScalar(name=scalars.LIMITED, least=0, most=1 << 16))
    for scalar in layout.scalars:
        scalars.fraction_bits(layout, scalar)
    return layout


def _tensors(
    parameters: Parameters, layout: pb.SecureLayout, model: State, buffers: Collection[str], frozen: Collection[str],
    history: History,
) -> Iterator[pb.SecureTensor]:  # fmt: skip
    weighted = not parameters.clip_norm
    slopes = []
    for name, tensor in model.items():
        if name in frozen or not tensor.numel():
            continue
        trained = tensor.is_floating_point() and name not in buffers
        if not weighted and not trained:
            continue
        if not tensor.is_floating_point():
            exact = min((2**63 - 1) // (layout.max_clients * scalars.weight_bound(layout)), _MOST_EXACT)
            yield pb.SecureTensor(name=name, shape=tensor.shape, clip=exact, weighted=weighted, bits=EXACT_BITS)
            continue
        if not weighted:
            clip = layout.noise.clip_norm
        elif trained and parameters.clip:
            clip = parameters.clip
        else:
            clip = history.clips.get(name, first_clip(parameters, name, trained=trained))
        part = pb.SecureTensor(name=name, clip=clip, weighted=weighted)
        part.shape.extend(_shape(layout, part, tensor))
        if trained and parameters.algorithm == "FedNova":
            part.divisor = "steps"
        yield part
        if trained and parameters.algorithm == "SCAFFOLD":
            slope = pb.SecureTensor(
                name=SLOPE + name, clip=history.clips.get(SLOPE + name, FIRST_SLOPE), weighted=weighted, source=name,
                divisor="travel", shape=part.shape, bits=_SLOPE_BITS,
            )  # fmt: skip
            slopes.append(slope)
    yield from slopes


def first_clip(parameters: Parameters, name: str, *, trained: bool) -> float:
    """Return the clip of a masked tensor in the first round."""
    if name.startswith(SLOPE):
        return FIRST_SLOPE
    if not trained:
        return FIRST_BUFFER_CLIP
    return parameters.clip or FIRST_CLIP


def source(tensor: pb.SecureTensor) -> str:
    """Return the name of the model's tensor that a masked tensor belongs to."""
    return tensor.source or tensor.name


def is_exact(tensor: pb.SecureTensor) -> bool:
    """Return whether a masked tensor holds whole numbers, which are summed exactly."""
    return tensor.bits == EXACT_BITS


def projection(layout: pb.SecureLayout, tensor: pb.SecureTensor, count: int) -> Projection:
    """Return the map from the ``count`` values of a tensor's change to its masked coordinates."""
    if is_exact(tensor):
        return Projection(count)
    seed = layout.public_seed + b"\0" + source(tensor).encode()
    return Projection(count, rotate=layout.rotate, every=every_of(layout.keep_fraction), seed=seed)


def _shape(layout: pb.SecureLayout, tensor: pb.SecureTensor, base: torch.Tensor) -> list[int]:
    """Return the shape of a masked tensor, of which only name, source and bits need to be set."""
    found = projection(layout, tensor, base.numel())
    return list(base.shape) if found.is_identity else [found.coordinates]


def dtype_of(layout: pb.SecureLayout, tensor: pb.SecureTensor) -> torch.dtype:
    """Return the dtype of a masked tensor."""
    return _DTYPES[tensor.bits or layout.bits]


def wire_specs(layout: pb.SecureLayout) -> list[TensorSpec]:
    """Return the specs of every masked update, and of their sum: the layout's tensors, and then the scalars."""
    specs = [
        TensorSpec(
            name=tensor.name, dtype=f"I{tensor.bits or layout.bits}", shape=tensor.shape,
            size=math.prod(tensor.shape) * dtype_of(layout, tensor).itemsize,
        )
        for tensor in layout.tensors
    ]  # fmt: skip
    specs.append(TensorSpec(name=SCALARS, dtype="I64", shape=[len(layout.scalars)], size=8 * len(layout.scalars)))
    return specs


def weight_of(layout: pb.SecureLayout, examples: int) -> int:
    """Return a client's weight in the sum: its number of examples, at most the layout's bound; 1 if all weigh 1."""
    return min(examples, scalars.weight_bound(layout)) if layout.max_examples else 1


def levels(layout: pb.SecureLayout) -> int:
    """Return the largest integer that a client's coordinate is quantised to, before noise of its own.

    It follows from the ring and the largest number of clients: ``max_clients * levels`` and the room for their noise
    are at most ``2^(bits - 1) - 1``, so that a sum of any of them cannot wrap around. Raises :class:`LayoutError`.
    """
    return grid(layout).steps


def steps_of(layout: pb.SecureLayout, tensor: pb.SecureTensor) -> int:
    """Return :func:`levels`, or what a tensor with a larger ring of its own has in its place."""
    return ((1 << (tensor.bits - 1)) - 1) // layout.max_clients if tensor.bits else levels(layout)


def grid(layout: pb.SecureLayout) -> Grid:
    """Return the steps of one client's largest coordinate, and its noise. Raises :class:`LayoutError`."""
    noise = layout.noise
    try:
        return _grid(layout.bits, layout.max_clients, noise.noise_multiplier, max(noise.contributors, 1))
    except ValueError as error:
        raise LayoutError(f"privacy.secureAggregation.bits: {error}") from None


_grid = lru_cache(maxsize=64)(grid_of)


def unit(layout: pb.SecureLayout, tensor: pb.SecureTensor) -> float:
    """Return the amount of weight times change that one step of a masked tensor stands for."""
    if is_exact(tensor):
        return 1.0
    return tensor.clip * scalars.weight_bound(layout) / steps_of(layout, tensor)


def problem_with(layout: pb.SecureLayout, base: State) -> str | None:
    """Return the problem with a layout that a client received for its base model, in one line, or ``None``."""
    if layout.bits not in (16, 32):
        return f"a ring of {layout.bits} bits is not supported"
    if not 1 <= layout.max_clients <= 1 << 20 or not 0 <= layout.max_examples <= _MOST_EXACT:
        return "the bounds of clients or examples are out of range"
    if not math.isfinite(layout.keep_fraction) or not 0 <= layout.keep_fraction <= 1:
        return "keep_fraction is not a share"
    if problem := _noise_problem(layout):
        return problem
    seen: set[str] = set()
    for tensor in layout.tensors:
        if tensor.name in seen or tensor.name == SCALARS:
            return f"{tensor.name} occurs twice"
        seen.add(tensor.name)
        if problem := _tensor_problem(layout, tensor, base.get(source(tensor))):
            return f"{tensor.name} {problem}"
    if problem := scalars.check(layout.scalars):
        return problem
    try:
        for scalar in layout.scalars:
            scalars.fraction_bits(layout, scalar)
    except LayoutError as error:
        return str(error)
    return None


def _noise_problem(layout: pb.SecureLayout) -> str | None:
    noise = layout.noise
    if not all(0 <= number <= _MOST_NOISE for number in (noise.clip_norm, noise.noise_multiplier, noise.count_noise)):
        return "the bounds of differential privacy are out of range"
    if noise.kind != (pb.SecureNoise.SKELLAM if noise.noise_multiplier else pb.SecureNoise.KIND_UNSPECIFIED):
        return "the kind of its noise is not known"
    if noise.noise_multiplier and not (noise.clip_norm and 1 < noise.contributors <= layout.max_clients):
        return "noise needs a bound of the changes, and more than one contributor"
    if noise.count_noise and not noise.noise_multiplier:
        return "a count has noise, and the changes have none"
    try:
        levels(layout)
    except LayoutError as error:
        return str(error)
    return None


def _tensor_problem(layout: pb.SecureLayout, tensor: pb.SecureTensor, base: torch.Tensor | None) -> str | None:
    if base is None:
        return "is not in the model"
    if tensor.bits not in (0, _SLOPE_BITS, EXACT_BITS) or is_exact(tensor) == base.is_floating_point():
        return f"cannot be sent as integers of {tensor.bits or layout.bits} bits"
    if tensor.bits and layout.noise.clip_norm:
        return "has a ring of its own under differential privacy"
    if tensor.divisor not in ("", *_DIVISORS) or (tensor.divisor and is_exact(tensor)):
        return f"has the unknown divisor {tensor.divisor!r}"
    if tensor.weighted == bool(layout.noise.clip_norm):
        return "is weighted under differential privacy" if tensor.weighted else "is not weighted"
    if not 0 < tensor.clip <= GREATEST_WEIGHT:
        return f"has the clip {tensor.clip:g}"
    if is_exact(tensor) and (int(tensor.clip) * layout.max_clients * scalars.weight_bound(layout) >= 1 << 63):
        return f"has the clip {tensor.clip:g}, with which a sum may leave 63 bits"
    if list(tensor.shape) != (shape := _shape(layout, tensor, base)):
        return f"has the shape {list(tensor.shape)} instead of {shape}"
    return None
