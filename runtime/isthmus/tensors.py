"""Conversion of state dicts to streams of chunks, and back.

A stream consists of the little-endian, contiguous bytes of the tensors in the order of their specs, cut into chunks
regardless of tensor boundaries, and an xxh3-128 checksum of all bytes.
"""

import hashlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import xxhash
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from isthmus_contracts.pb.federation_pb2 import TensorSpec
from isthmus_contracts.text import one_line

State = dict[str, torch.Tensor]
Data = bytes | memoryview

# Far below gRPC's default limit of 4 MiB per message, and large enough to make the cost per message negligible.
CHUNK_BYTES = 1 << 20
_SMALLEST_CHUNK_BYTES = 1 << 16
# PyTorch's own limit for most of its functions.
MAX_DIMENSIONS = 64
# Tensors' sizes and offsets are signed 64-bit numbers.
_MOST_BYTES = 2**63 - 1
# Memory for chunks in an aggregator's gRPC, over all clients: for each it holds a few copies when sending, and a buffer
# for the next chunk when receiving.
_ALL_CHUNKS_BYTES = 16 << 20

# Means, differences and squares of weights up to this bound stay finite in float32 in all strategies. Larger weights
# come from training that has diverged: updates that hold them are refused, and results are clamped.
GREATEST_WEIGHT = 2.0**60
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # names as in safetensors
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TransferError(ValueError):
    """A stream of tensors is invalid. ``str()`` gives the reason."""


class TruncatedError(TransferError):
    """The stream ended early."""


class ChecksumError(TransferError):
    """The stream is complete, but its checksum does not match."""


def snapshot(state: Mapping[str, torch.Tensor], room: State | None = None) -> State:
    """Return a contiguous copy in main memory, independent of later training steps. ``room``: see :func:`allocate`.

    Raises :class:`TransferError`.
    """
    return {
        name: allocate_like(name, checked(name, tensor).shape, tensor.dtype, room).copy_(tensor.detach())
        for name, tensor in state.items()
    }


def checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor if it can be sent. Raises :class:`TransferError`."""
    if (problem := impediment(tensor)) is not None:
        raise TransferError(f"{name} {problem}")
    if tensor.dtype not in _NAMES:
        raise TransferError(f"{name} has dtype {tensor.dtype}, which cannot be sent")
    return tensor


def impediment(value: object) -> str | None:
    """Return why a value cannot be sent as one piece of memory, or ``None`` if it can."""
    if not isinstance(value, torch.Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    if torch.nn.parameter.is_lazy(value):
        return "has no shape yet (a lazy module): run a forward pass first"
    if value.is_nested:
        return "is a nested tensor"
    if value.layout != torch.strided:
        return f"is a tensor of layout {value.layout}, not a dense one"
    if value.is_quantized:
        return "is a quantized tensor"
    if value.device.type == "meta":
        return "is on the meta device, where tensors have no values: load the model's weights first"
    if is_traceable_wrapper_subclass(value):
        return f"is a {type(value).__name__}, not a plain tensor"
    return None


def specs_of(state: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    """Return the specs of tensors, for a stream's header."""
    return [
        TensorSpec(
            name=name, dtype=_NAMES[tensor.dtype], shape=tensor.shape, size=tensor.numel() * tensor.element_size()
        )
        for name, tensor in state.items()
    ]


def chunk_bytes(clients: int) -> int:
    """Return the chunk size for an aggregator with this number of clients. Bytes."""
    return min(max(_ALL_CHUNKS_BYTES // max(clients, 1), _SMALLEST_CHUNK_BYTES), CHUNK_BYTES)


def chunks_of(state: Mapping[str, torch.Tensor], size: int = CHUNK_BYTES) -> Iterator[Data]:
    """Yield the stream's chunks of at most ``size`` bytes. Small tensors share a chunk; large ones are views."""
    gathered = bytearray()
    for tensor in state.values():
        view = bytes_view(tensor)
        start = 0
        while start < len(view):
            part = view[start : start + size - len(gathered)]
            start += len(part)
            if not gathered and len(part) == size:
                yield part
                continue
            gathered += part
            if len(gathered) == size:
                yield bytes(gathered)
                gathered.clear()
    if gathered:
        yield bytes(gathered)


def checksum_of(state: Mapping[str, torch.Tensor]) -> str:
    """Return the checksum of the stream's bytes, in hexadecimal."""
    digest = xxhash.xxh3_128()
    for tensor in state.values():
        digest.update(bytes_view(tensor))
    return digest.hexdigest()


def sha256_of(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the tensors' names, dtypes, shapes and bytes, in hexadecimal.

    The order of the names does not matter. :func:`checksum_of` finds damage only: two models with the same checksum can
    be constructed, but not two with the same SHA-256.
    """
    digest = hashlib.sha256()
    for spec in sorted(specs_of(state), key=lambda spec: spec.name):
        fields = (spec.name.encode(), spec.dtype.encode(), str(list(spec.shape)).encode())
        for data in (*fields, bytes_view(state[spec.name])):
            digest.update(len(data).to_bytes(8, "big"))
            digest.update(data)
    return digest.hexdigest()


class RawDecoder:
    """Receiver of a raw stream, which allocates exactly the tensors that the specs announce."""

    def __init__(self, specs: Iterable[TensorSpec], room: State | None = None) -> None:
        """``room``: see :func:`allocate`."""
        self._tensors: State = {}
        self._views: list[memoryview] = []
        specs = list(specs)
        if (problem := invalid_specs(specs)) is not None:
            raise TransferError(problem.message)
        for spec in specs:
            tensor = allocate(spec, room)
            self._tensors[spec.name] = tensor
            self._views.append(bytes_view(tensor))
        self._digest = xxhash.xxh3_128()
        self._current = 0  # index of the view being filled
        self._filled = 0  # bytes filled of it
        self.received = 0  # bytes

    def write(self, data: Data) -> None:
        """Receive one chunk. Raises :class:`TransferError` if there is more data than announced."""
        self._digest.update(data)
        self.received += len(data)
        source = memoryview(data)
        while source:
            if self._current == len(self._views):
                raise TransferError("more data than the header announced")
            view = self._views[self._current]
            part = source[: len(view) - self._filled]
            view[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            source = source[len(part) :]
            if self._filled == len(view):
                self._current, self._filled = self._current + 1, 0

    def finish(self, checksum: str) -> State:
        """Return the tensors of a complete stream. Raises :class:`TransferError` if it is incomplete or damaged."""
        while self._current < len(self._views) and not len(self._views[self._current]):
            self._current += 1
        if self._current < len(self._views):
            raise TruncatedError(f"the stream ended early, after {self.received} bytes")
        if self._digest.hexdigest() != checksum:
            raise ChecksumError("the checksum does not match the data")
        return self._tensors


@dataclass(frozen=True)
class Mismatch:
    """Problem with specs, as a keyword and as a line of text."""

    aspect: Literal["missing_tensor", "unknown_tensor", "dtype", "shape", "size", "duplicate"]
    message: str

    def __str__(self) -> str:
        return self.message


def invalid_specs(specs: Iterable[TensorSpec]) -> Mismatch | None:
    """Return why the specs of a raw stream are invalid for any model, or ``None``."""
    seen = set()
    for spec in specs:
        if spec.name in seen:
            return Mismatch("duplicate", f"{one_line(spec.name, 100)} is announced twice")
        seen.add(spec.name)
        if spec.dtype not in _DTYPES:
            return Mismatch("dtype", f"{one_line(spec.name, 100)} has the unknown dtype {one_line(spec.dtype, 30)!r}")
        if not _is_possible(spec.shape, itemsize := dtype_of(spec).itemsize):
            return Mismatch("shape", f"{spec.name} has an impossible shape: {_shown(spec.shape)}")
        if math.prod(spec.shape) * itemsize != spec.size:
            shape = _shown(spec.shape)
            return Mismatch("size", f"{spec.name}: {spec.size} bytes do not fit {spec.dtype} of shape {shape}")
    return None


def _is_possible(shape: Sequence[int], itemsize: int) -> bool:
    """Return whether a tensor can have this shape.

    An empty dimension does not excuse large ones: strides, and readers of safetensors, multiply them one by one.
    """
    return len(shape) <= MAX_DIMENSIONS and math.prod(max(size, 1) for size in shape) * itemsize <= _MOST_BYTES


def _shown(shape: Sequence[int]) -> str:
    return one_line(str(list(shape[: MAX_DIMENSIONS + 1])), 100)


def mismatch(expected: Sequence[TensorSpec], offered: Sequence[TensorSpec]) -> Mismatch | None:
    """Return how the offered specs differ from the expected ones, or ``None``."""
    wanted = {spec.name: spec for spec in expected}
    given = {spec.name: spec for spec in offered}
    if missing := [name for name in wanted if name not in given]:
        return Mismatch("missing_tensor", f"tensors are missing: {_listed(missing)}")
    if unknown := [name for name in given if name not in wanted]:
        return Mismatch("unknown_tensor", f"unknown tensors: {_listed(unknown)}")
    for name, spec in wanted.items():
        other = given[name]
        if other.dtype != spec.dtype:
            return Mismatch("dtype", f"{name} is {one_line(other.dtype, 30)}, but the model's is {spec.dtype}")
        if list(other.shape) != list(spec.shape):
            shapes = f"{_shown(other.shape)}, but the model's has {_shown(spec.shape)}"
            return Mismatch("shape", f"{name} has shape {shapes}")
    return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(one_line(name, 100) for name in names[:5])


def non_finite(state: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, if any."""
    found = first_beyond(sys.float_info.max, state)
    return found[0] if found is not None else None


def first_beyond(limit: float, state: Mapping[str, torch.Tensor]) -> tuple[str, float] | None:
    """Return the first floating-point tensor with a value of larger magnitude, or NaN, and that value."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel():
            # One pass without a copy; the extremes are infinite or NaN if any value is.
            for extreme in map(float, torch.aminmax(tensor)):
                if not abs(extreme) <= limit:
                    return name, extreme
    return None


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums: at least single precision, and never narrower than the tensors themselves."""
    return torch.float32 if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float64


def group(name: str, state: State) -> State:
    """Prefix the tensors' names, so that they can be stored with other groups."""
    return {f"{name}/{key}": tensor for key, tensor in state.items()}


def ungroup(name: str, state: State) -> State:
    """Return the tensors that :func:`group` prefixed with this name."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def dtype_of(spec: TensorSpec) -> torch.dtype:
    """Return the dtype of a spec. Raises :class:`TransferError` if it is unknown."""
    if spec.dtype not in _DTYPES:
        raise TransferError(f"{one_line(spec.name, 100)} has the unknown dtype {one_line(spec.dtype, 30)!r}")
    return _DTYPES[spec.dtype]


def allocate(spec: TensorSpec, room: State | None = None) -> torch.Tensor:
    """Allocate the tensor that a spec announces. Raises :class:`TransferError` if there is no memory for it.

    ``room``: tensors that are no longer needed. One that fits is reused, since touching fresh memory takes several
    times as long as filling it.
    """
    try:
        return allocate_like(spec.name, tuple(spec.shape), dtype_of(spec), room)
    except (RuntimeError, TypeError):  # RuntimeError: from PyTorch's allocator; TypeError: a dimension above 2**63 - 1
        name = one_line(spec.name, 100)
        raise TransferError(f"{name} announces {spec.size} bytes, for which there is no memory") from None


def allocate_like(name: str, shape: Sequence[int], dtype: torch.dtype, room: State | None) -> torch.Tensor:
    """Return the spare tensor of this name if it fits, or a new one. Its content is undefined."""
    spare = (room or {}).get(name)
    if spare is not None and (spare.dtype, tuple(spare.shape)) == (dtype, tuple(shape)) and spare.is_contiguous():
        return spare
    return torch.empty(tuple(shape), dtype=dtype, device="cpu")


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values in one dimension with a stride of 1: a view of a contiguous tensor, or else a copy.

    A tensor of one element counts as contiguous whatever its stride. ``reshape(-1)`` keeps that stride, and
    ``view(dtype)`` then fails.
    """
    tensor = tensor.detach()
    return tensor.as_strided((tensor.numel(),), (1,)) if tensor.is_contiguous() else tensor.reshape(-1)


def bytes_view(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor, as bytes."""
    return flat(tensor).view(torch.uint8).numpy().data
