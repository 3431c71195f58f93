"""Bounds on everything that clients send: number, length and characters of each string, list and map.

They are checked before anything is kept. What passes here fits the checkpoints' headers, which hold names of tensors,
buffers and metrics, and the status: no client can make a committed round unreadable, or the memory grow by names.
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
"""No scheduler starts a client so often. An attempt that nobody can have issued would fence all that are issued."""
# Of a model's part of a checkpoint's header: room is left for what else is in it, and for a strategy's state, which may
# name each tensor twice.
_MOST_HEADER_BYTES = 40 << 20
# A character of JSON text takes at most three times its bytes in UTF-8; offsets and punctuation come on top.
_HEADER_FACTOR, _HEADER_BYTES_EACH = 3, 128
_MOST_CODECS = 16
_MOST_NUMBERS = 64
_LONGEST_WORD = 128
_LONGEST_VERSION = 64
_HELLO_BYTES = 4096
# Beside the tensors' specs and names: metrics, scalars, seconds, codecs.
_OTHER_HEADER_BYTES = 1 << 20


def problem_with_hello(hello: pb.Hello) -> str | None:
    """Return what is wrong with a hello, in one line; ``None`` if nothing is."""
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
    """Return what is wrong with the strings, lists and maps of an update's header; ``None`` if nothing is.

    Tensors' names are checked only for initial weights (:func:`problem_with_names`): those of later updates must be
    the model's.
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
    """Return what is wrong with a header's size, where it takes ``model_bytes`` to announce the model's tensors.

    It counts what the protocol does not know, too, which would be kept as long as the header.
    """
    size, most = header.ByteSize(), _OTHER_HEADER_BYTES + 2 * model_bytes
    return None if size <= most else f"the header has {size} bytes, far more than it takes to announce the model"


def problem_with_names(header: pb.UpdateHeader) -> str | None:
    """Return what is wrong with the tensors of initial weights, as far as names and numbers go."""
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
    """Return why initial weights cannot be kept, whatever else is: they are larger than the memory or the disk.

    The final model is written with all names, those included that are views of others. ``directory``: of the
    checkpoints.
    """
    size = sum(spec.size for spec in header.tensors)
    elements = {spec.name: spec.size // max(math.prod(spec.shape), 1) for spec in header.tensors}
    written = size + sum(math.prod(view.shape) * elements.get(view.of, 0) for view in header.views)
    for what, needed, room in (("memory", size, _memory()), ("disk", written, _disk(directory))):
        if needed > room:
            return f"the model takes {needed} bytes, and the aggregator's {what} has room for {room}"
    return None


def _memory() -> float:
    """The bytes that there are at most, of the machine or of the container."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):  # where there is no such file the limit is not known
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        return min(machine, int(limit)) if limit.isdecimal() else machine
    return machine


def _disk(directory: Path | None) -> float:
    """The bytes that are free."""
    with suppress(OSError):
        return shutil.disk_usage(directory).free if directory is not None else math.inf
    return math.inf


def _problem_with_numbers(name: str, numbers: Mapping[str, float]) -> str | None:
    if len(numbers) > _MOST_NUMBERS or not all(map(_is_word, numbers)):
        return f"{name} must be at most {_MOST_NUMBERS} printable names"
    return None


def _problem_with_parts(header: pb.UpdateHeader, kind: str, names: Sequence[str]) -> str | None:
    """Return why ``names`` cannot be some of the tensors."""
    if not names:
        return None
    if len(names) > len(header.tensors):
        return f"{len(names)} {kind}s are more than the {len(header.tensors)} tensors"
    strangers = set(names) - {spec.name for spec in header.tensors}
    return f"the {kind} {one_line(repr(min(strangers)), 60)} is not one of the tensors" if strangers else None


def _is_word(text: str) -> bool:
    return len(text) <= _LONGEST_WORD and text.isprintable()
