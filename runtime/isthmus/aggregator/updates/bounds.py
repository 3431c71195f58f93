"""Bounds on everything that clients send: number, length and characters of each string, list and map.

They are checked before anything is stored. Data within the bounds fits the status and the headers of checkpoints, which
hold the names of tensors, buffers and metrics. So no client can make a committed round unreadable or fill the memory.
"""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.text import one_line

from ... import metric_names as metricnames

MOST_TENSORS = 100_000
LONGEST_TENSOR_NAME = 512
MOST_ATTEMPT = 100_000
"""No scheduler starts a client this often. A made-up attempt number would fence all real ones."""
# Bound of the model's part of a checkpoint's header. It leaves room for the other parts, and for a strategy's state,
# which may name each tensor twice.
_MOST_HEADER_BYTES = 40 << 20
# JSON text has at most three times the bytes of its UTF-8 source, plus offsets and punctuation for each tensor.
_HEADER_FACTOR, _HEADER_BYTES_EACH = 3, 128
_MOST_CODECS = 16
_MOST_NUMBERS = 64
_LONGEST_WORD = 128
_LONGEST_VERSION = 64
_HELLO_BYTES = 4096
# Bound of a header apart from the tensors' specs and names: metrics, scalars, seconds, codecs.
_OTHER_HEADER_BYTES = 1 << 20


def problem_with_hello(hello: pb.Hello) -> str | None:
    """Return the reason why a hello is invalid, in one line; ``None`` if it is valid."""
    if hello.ByteSize() > _HELLO_BYTES:
        return f"the hello has {hello.ByteSize()} bytes, more than {_HELLO_BYTES}"
    words = {
        "job_uid": hello.job_uid, "pool": hello.pool, "instance": hello.instance, "base_digest": hello.base_digest,
    }  # fmt: skip
    for name, word in words.items():
        if not _is_word(word):
            return f"{name} must be at most {_LONGEST_WORD} printable characters, not {one_line(repr(word), 60)}"
    if len(hello.version) > _LONGEST_VERSION or not hello.version.isprintable():
        return f"version must be at most {_LONGEST_VERSION} printable characters"
    if hello.attempt > MOST_ATTEMPT:
        return f"attempt {hello.attempt} cannot be one that a scheduler has started: at most {MOST_ATTEMPT}"
    return None


def problem_with_header(header: pb.UpdateHeader) -> str | None:
    """Return the reason why strings, lists or maps of an update's header are invalid, or ``None``.

    Names of tensors are checked only for initial weights (:func:`problem_with_names`); those of later updates must
    equal the model's.
    """
    for name, word in (("instance", header.instance), ("base_digest", header.base_digest)):
        if not _is_word(word):
            return f"{name} must be at most {_LONGEST_WORD} printable characters, not {one_line(repr(word), 60)}"
    if len(header.codecs) > _MOST_CODECS or not all(map(_is_word, header.codecs)):
        return f"codecs must be at most {_MOST_CODECS} printable names"
    for name, numbers in (("scalars", header.scalars), ("seconds", header.seconds)):
        if problem := _problem_with_numbers(name, numbers):
            return problem
    if problem := metricnames.problem_with(header.metrics):
        return problem
    return _problem_with_parts(header, "buffer", header.buffers) or _problem_with_parts(
        header, "frozen tensor", header.frozen
    )


def problem_with_size(header: pb.UpdateHeader, model_bytes: int) -> str | None:
    """Return the reason why a header is too large, or ``None``.

    ``model_bytes``: the bytes that announcing the model's tensors takes. Unknown fields count too, since they would be
    stored with the header.
    """
    size, most = header.ByteSize(), _OTHER_HEADER_BYTES + 2 * model_bytes
    return None if size <= most else f"the header has {size} bytes, far more than it takes to announce the model"


def problem_with_names(header: pb.UpdateHeader) -> str | None:
    """Return the reason why names or number of the tensors of initial weights are invalid, or ``None``."""
    specs = header.tensors
    if not specs:
        return "there are no tensors"
    if (count := len(specs) + len(header.views)) > MOST_TENSORS:
        return f"{count} tensors are too many: at most {MOST_TENSORS}"
    names = [*(spec.name for spec in specs), *(view.name for view in header.views)]
    for name in names:
        if len(name) > LONGEST_TENSOR_NAME or not name or not name.isprintable():
            shown = one_line(repr(name), 60)
            return f"tensors' names must be 1 to {LONGEST_TENSOR_NAME} printable characters, not {shown}"
    numbers = sum(len(view.shape) + len(view.stride) for view in header.views)
    text = _HEADER_FACTOR * (header.ByteSize() + numbers) + _HEADER_BYTES_EACH * len(names)
    if text > _MOST_HEADER_BYTES:
        return f"the names of {len(names)} tensors are too long for a checkpoint's header"
    return None


def problem_with_room(header: pb.UpdateHeader, directory: Path | None) -> str | None:
    """Return the reason why initial weights do not fit into memory or on disk, or ``None``.

    The final model is written with all names, including those that are views of others. ``directory``: where
    checkpoints are stored.
    """
    size = sum(spec.size for spec in header.tensors)
    elements = {spec.name: spec.size // max(math.prod(spec.shape), 1) for spec in header.tensors}
    written = size + sum(math.prod(view.shape) * elements.get(view.of, 0) for view in header.views)
    for what, needed, room in (("memory", size, _memory()), ("disk", written, _disk(directory))):
        if needed > room:
            return f"the model takes {needed} bytes, and the aggregator's {what} has room for {room}"
    return None


def _memory() -> float:
    """Return the total memory of the machine or of the container, in bytes."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):  # without this file the limit is unknown
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        return min(machine, int(limit)) if limit.isdecimal() else machine
    return machine


def _disk(directory: Path | None) -> float:
    """Return the free bytes on the disk."""
    with suppress(OSError):
        return shutil.disk_usage(directory).free if directory is not None else math.inf
    return math.inf


def _problem_with_numbers(name: str, numbers: Mapping[str, float]) -> str | None:
    if len(numbers) > _MOST_NUMBERS or not all(map(_is_word, numbers)):
        return f"{name} must be at most {_MOST_NUMBERS} printable names"
    return None


def _problem_with_parts(header: pb.UpdateHeader, kind: str, names: Sequence[str]) -> str | None:
    """Return the reason why ``names`` are not a subset of the tensors, or ``None``."""
    if not names:
        return None
    if len(names) > len(header.tensors):
        return f"{len(names)} {kind}s are more than the {len(header.tensors)} tensors"
    strangers = set(names) - {spec.name for spec in header.tensors}
    return f"the {kind} {one_line(repr(min(strangers)), 60)} is not one of the tensors" if strangers else None


def _is_word(text: str) -> bool:
    return len(text) <= _LONGEST_WORD and text.isprintable()
