"""Reading and writing of safetensors files without a copy of the model in memory.

The library's own writer copies every tensor. This module streams the format instead: the header's length (8 bytes,
little-endian), the header (JSON), and the tensors' bytes. The library can read the files.
Source: https://huggingface.co/docs/safetensors, "Format".
"""

import ctypes
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open

from ...libc import libc_function
from ...tensors import State, bytes_view, specs_of

# Below this size, handing the work to a thread takes longer than the work.
SMALL_BYTES = 1 << 20
# The library rejects longer headers: MAX_HEADER_SIZE in safetensors/src/tensor.rs.
MOST_HEADER_BYTES = 100_000_000
_READ_BYTES = 16 << 20
# Small enough that a written piece is still in the processor's cache when its checksum is computed.
_WRITTEN_BYTES = 1 << 20
# Number of pieces after which writing back to disk is started.
_PIECES_AT_ONCE = 16
_SYNC_FILE_RANGE_WRITE = 2  # fs.h of Linux


@dataclass(frozen=True)
class TensorFile:
    """Identity and layout of a file, known after it was written or read once."""

    path: Path
    digest: str
    """xxh3-128 of the header and the checksum; identifies the model."""
    checksum: str
    """xxh3-128 of the tensors' bytes in the file's order; part of a stream's trailer."""
    data_offset: int
    size: int
    """Size of all tensors in bytes."""


class HeaderError(ValueError):
    """The header of a file would be too long for its readers. ``str()`` has the details."""


def write(path: Path, state: State, metadata: Mapping[str, str]) -> TensorFile:
    """Write a file, overwriting any old content, and make the content durable, but not its name.

    Raises:
        OSError: the file cannot be written.
        HeaderError: the header would be too long. Nothing is written.
    """
    header, offset = {"__metadata__": dict(metadata)}, 0
    for spec in specs_of(state):
        offsets = [offset, offset + spec.size]
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}  # type: ignore[dict-item]
        offset += spec.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    if len(text) > MOST_HEADER_BYTES:
        raise HeaderError(
            f"a header of {len(text)} bytes, and safetensors reads at most {MOST_HEADER_BYTES}: fewer tensors, shorter "
            "names, or fewer clients"
        )
    lead, checksum = len(text).to_bytes(8, "little") + text, xxhash.xxh3_128()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb", buffering=0) as file:
        # Not file.write: an unbuffered file may write only a part, without an error.
        if offset <= SMALL_BYTES:
            data = memoryview(b"".join([lead, *map(_bytes, state.values())]))
            _write_all(file.fileno(), data)
            checksum.update(data[len(lead) :])
        else:
            _write_all(file.fileno(), memoryview(lead))
            for number, piece in enumerate(_pieces(state), 1):
                _write_all(file.fileno(), piece)
                checksum.update(piece)
                if number % _PIECES_AT_ONCE == 0:
                    _begin_writing_back(file.fileno())
        file.truncate(len(lead) + offset)
        _synchronize(file.fileno())
    return _described(path, lead, checksum.hexdigest(), offset)


def read(path: Path) -> tuple[TensorFile, State, dict[str, str]]:
    """Return a file's identity, its tensors (mapped) and its metadata. Raise ``OSError`` or ``SafetensorError``."""
    with safe_open(path, framework="pt") as opened:
        metadata = dict(opened.metadata() or {})
    checksum = xxhash.xxh3_128()
    with path.open("rb") as file:
        lead = file.read(8)
        lead += file.read(int.from_bytes(lead, "little"))
        while piece := file.read(_READ_BYTES):
            checksum.update(piece)
    found = _described(path, lead, checksum.hexdigest(), path.stat().st_size - len(lead))
    return found, mapped(path), metadata


def mapped(path: Path) -> State:
    """Return the tensors, in the file's order, backed by the file: only pages that are accessed occupy memory."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    names = sorted(header, key=lambda name: tuple(header[name]["data_offsets"]))
    with safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in names}


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal. Raise ``OSError``."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _described(path: Path, lead: bytes, checksum: str, size: int) -> TensorFile:
    return TensorFile(path, xxhash.xxh3_128_hexdigest(lead + checksum.encode()), checksum, len(lead), size)


def _pieces(state: State) -> Iterator[memoryview]:
    for tensor in state.values():
        view = _bytes(tensor)
        for start in range(0, len(view), _WRITTEN_BYTES):
            yield view[start : start + _WRITTEN_BYTES]


def _bytes(tensor: torch.Tensor) -> memoryview:
    return bytes_view(tensor.contiguous())


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _begin_writing_back(descriptor: int) -> None:
    """Start writing back to disk, without waiting, so that the final sync takes less time.

    Does nothing on systems without sync_file_range(2).
    """
    if (begin := _sync_file_range()) is not None:
        begin(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)  # the whole file; the final sync reports errors again


@cache
def _sync_file_range() -> Any | None:
    call: Any = libc_function("sync_file_range")
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def _synchronize(descriptor: int) -> None:
    """Make a file's content durable. Its times need not be, on systems that make the difference."""
    os.fdatasync(descriptor) if hasattr(os, "fdatasync") else os.fsync(descriptor)


def save_plain(path: Path, state: State) -> None:
    """Write a file with ``torch.save`` and make it durable. Raise ``OSError``."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch wraps the file's OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())
