"""Masks: keystreams that are added to tensors of integers, modulo 2^16, 2^32 or 2^64.

A key's stream covers all tensors of a vector: those of larger elements first, then by name, without gaps. It is the
keystream of AES-256 in counter mode (NIST SP 800-38A) over the counters of GCM (SP 800-38D, section 7.1): 96 bits with
the segment's number, 32 bits that begin at 2 in each segment. Segments of 512 KiB can be made in any order.

OpenSSL's GCM uses vector AES instructions, its counter mode does not: 21 GB/s against 8.6 on one core (AMD Zen 5). So
segments come from GCM, without computing a tag.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from .keys import KEY_BYTES

# One for the keystream and one for the sum of masks fit a core's second-level cache of 1 MiB.
SEGMENT_BYTES = 1 << 19
_AES_BYTES = 16
# Read-only pages of zeros, which the kernel backs with one.
_ZEROS = bytes(SEGMENT_BYTES)
_Dtype = np.dtype[np.signedinteger[Any]]
_DTYPES: dict[torch.dtype, _Dtype] = {
    torch.int16: np.dtype("<i2"),
    torch.int32: np.dtype("<i4"),
    torch.int64: np.dtype("<i8"),
}

Integers = npt.NDArray[np.signedinteger[Any]]


class MaskError(ValueError):
    """Masks do not fit the tensors. ``str()`` gives the reason."""


class MasksCancelledError(Exception):
    """The addition of masks was cancelled; the target holds an unknown part of them."""


class Size(NamedTuple):
    """Size of one tensor of a vector."""

    dtype: torch.dtype
    elements: int


class _Part(NamedTuple):
    """Place of a tensor in the stream, in bytes."""

    name: str
    dtype: _Dtype
    start: int
    stop: int


def sizes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Size]:
    return {name: Size(tensor.dtype, tensor.numel()) for name, tensor in tensors.items()}


def add_masks(
    target: Mapping[str, torch.Tensor], keys: Sequence[tuple[bytes, int]], threads: int = 1,
    cancel: threading.Event | None = None,
) -> None:  # fmt: skip
    """Add the masks of all keys to the target, in place; each key comes with its sign, 1 or -1.

    Every segment of the target is read and written once, for all keys. The threads work in parallel: ciphers and
    additions release the interpreter's lock. Raises ``MaskError`` for tensors that are not contiguous integers, and
    ``MasksCancelledError`` soon after ``cancel`` is set.
    """
    signed = [(_checked(key), sign) for key, sign in keys]
    parts = _parts(sizes_of(target))
    flat = {part.name: _flat(part.name, target[part.name], part) for part in parts}
    segments = list(_segments(parts))
    if not signed or not segments:
        return
    if threads <= 1 or len(segments) == 1:
        _add_segments(segments, flat, signed, cancel)
        return
    threads = min(threads, len(segments))
    with ThreadPoolExecutor(threads, "masks") as pool:
        waiting = [pool.submit(_add_segments, segments[of::threads], flat, signed, cancel) for of in range(threads)]
    for future in waiting:
        future.result()


class _Segment(NamedTuple):
    number: int
    length: int
    parts: list[_Part]  # in bytes from the segment's begin
    offsets: list[int]  # of each part's first byte in its tensor


def _segments(parts: Sequence[_Part]) -> Iterator[_Segment]:
    """Yield the stream's segments with the pieces of tensors in them."""
    length = parts[-1].stop if parts else 0
    at = 0
    for number, begin in enumerate(range(0, length, SEGMENT_BYTES)):
        end = min(begin + SEGMENT_BYTES, length)
        while parts[at].stop <= begin:
            at += 1
        segment = _Segment(number, end - begin, [], [])
        for part in parts[at:]:
            if part.start >= end:
                break
            start, stop = max(part.start, begin), min(part.stop, end)
            if start < stop:
                segment.parts.append(_Part(part.name, part.dtype, start - begin, stop - begin))
                segment.offsets.append(start - part.start)
        yield segment


def _add_segments(
    segments: Iterable[_Segment], target: Mapping[str, Integers], keys: Sequence[tuple[bytes, int]],
    cancel: threading.Event | None,
) -> None:  # fmt: skip
    # A cipher may write up to a block more than its input's length.
    total, mask = (bytearray(SEGMENT_BYTES + _AES_BYTES) for _ in range(2))
    for segment in segments:
        groups = list(_groups(segment))
        for number, (key, sign) in enumerate(keys):
            if cancel is not None and cancel.is_set():
                raise MasksCancelledError
            # The sum is relative to the first key's sign: its mask is written in place, not added to zeros.
            _whole(key, segment, mask if number else total)
            if number:
                for dtype, start, stop in groups:
                    _add(_view(total, dtype, start, stop), _view(mask, dtype, start, stop), sign * keys[0][1])
        for part, offset in zip(segment.parts, segment.offsets, strict=True):
            first = offset // part.dtype.itemsize
            piece = _view(total, part.dtype, part.start, part.stop)
            _add(target[part.name][first : first + len(piece)], piece, keys[0][1])


def _groups(segment: _Segment) -> Iterator[tuple[_Dtype, int, int]]:
    """Yield the ranges of bytes of a segment with elements of one type: these can be added at once."""
    start = 0
    for part, following in zip(segment.parts, [*segment.parts[1:], None], strict=True):
        if following is None or following.dtype != part.dtype:
            yield part.dtype, start, part.stop
            start = part.stop


def _add(target: Integers, mask: Integers, sign: int) -> None:
    """Add or subtract in place; integers wrap around."""
    (np.add if sign > 0 else np.subtract)(target, mask, out=target)


def _view(buffer: bytearray, dtype: _Dtype, start: int, stop: int) -> Integers:
    return np.frombuffer(buffer, dtype, (stop - start) // dtype.itemsize, start)


def _whole(key: bytes, segment: _Segment, output: bytearray) -> None:
    """Write the keystream of a segment."""
    cipher = Cipher(AES(key), GCM(segment.number.to_bytes(12, "big"))).encryptor()
    zeros = _ZEROS if segment.length == SEGMENT_BYTES else memoryview(_ZEROS)[: segment.length]
    cipher.update_into(zeros, output)


def _parts(sizes: Mapping[str, Size]) -> list[_Part]:
    """Return the tensors' places in the stream, in its order."""
    for name, size in sizes.items():
        if size.dtype not in _DTYPES:
            raise MaskError(f"{name}: no mask fits a tensor of {size.dtype}; it must be int16, int32 or int64")
    parts: list[_Part] = []
    start = 0
    # Large elements first, so that every element lies at a multiple of its size.
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        dtype = _DTYPES[size.dtype]
        parts.append(_Part(name, dtype, start, start + size.elements * dtype.itemsize))
        start = parts[-1].stop
    return parts


def _flat(name: str, tensor: torch.Tensor, part: _Part) -> Integers:
    """Return a tensor's memory as a flat array."""
    if not tensor.is_contiguous() or _DTYPES.get(tensor.dtype) != part.dtype:
        raise MaskError(f"{name}: a mask of {part.dtype} needs a contiguous tensor of the same type")
    if tensor.numel() * part.dtype.itemsize != part.stop - part.start:
        raise MaskError(f"{name}: {tensor.numel()} elements differ from the mask's size")
    flat: Integers = tensor.detach().reshape(-1).numpy()
    return flat


def _checked(key: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise MaskError(f"a mask's key has {len(key)} bytes instead of {KEY_BYTES}")
    return key
