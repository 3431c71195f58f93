"""Validation of updates, with a closed set of reasons for refusal that replies and metrics share."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.text import one_line

from ...codecs import CodecError, NonFiniteError
from ...framing import MAX_EXAMPLES
from ...strategies import GREATEST_WEIGHT, Strategy
from ...tensors import ChecksumError, State, TransferError, TruncatedError, first_beyond, invalid_specs, mismatch
from ...views import difference, invalid_views, views_of
from ..model.compression import Compression
from ..model.global_model import GlobalModel
from . import bounds

RESERVED_NAME = "__metadata__"
# Key of the reason in the trailing metadata of a refusal by gRPC status, where the stream has to be sent again.
REASON_METADATA = "isthmus-reason"


class Reason(StrEnum):
    """Reason for a refusal. A metric has a series for each."""

    # Refused for good: the round no longer waits for this update.
    NON_FINITE = "non_finite"
    RANGE = "range"
    MISSING_TENSOR = "missing_tensor"
    UNKNOWN_TENSOR = "unknown_tensor"
    SHAPE = "shape"
    DTYPE = "dtype"
    SIZE = "size"
    DUPLICATE = "duplicate"
    SHARED = "shared"
    EXAMPLES = "examples"
    CODEC = "codec"
    SCALARS = "scalars"
    FROZEN = "frozen"
    BOUNDS = "bounds"
    CLEAR = "clear"
    # To be sent again.
    CHECKSUM = "checksum"
    TRUNCATED = "truncated"
    MALFORMED = "malformed"
    STORAGE = "storage"
    NOT_CONNECTED = "not_connected"
    # Valid, but not awaited.
    STALE = "stale"
    CLOSED = "closed"
    FENCED = "fenced"
    NOT_SELECTED = "not_selected"
    INCARNATION = "incarnation"


_OF_VERDICT = {
    pb.PushReply.STALE: Reason.STALE,
    pb.PushReply.CLOSED: Reason.CLOSED,
    pb.PushReply.FENCED: Reason.FENCED,
}


@dataclass(frozen=True)
class Fault:
    """Reason for a refusal, and one printable line of details, which may contain names that the client chose."""

    reason: Reason
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", one_line(self.message))

    def __str__(self) -> str:
        return self.message


class StorageError(TransferError):
    """A complete update cannot be stored at the moment. It has to be sent again."""


def examine(header: pb.UpdateHeader, model: GlobalModel, compression: Compression, strategy: Strategy) -> Fault | None:
    """Return the fault of an update that its header shows, or ``None``."""
    if problem := bounds.problem_with_size(header, model.header_bytes) or bounds.problem_with_header(header):
        return Fault(Reason.BOUNDS, problem)
    if not 1 <= header.num_examples <= MAX_EXAMPLES:
        return Fault(Reason.EXAMPLES, "num_examples must be at least 1" + _as_signed(header.num_examples))
    if problem := compression.problem(header):
        return Fault(Reason.CODEC, problem)
    if problem := difference(model.views, views_of(header.views)):
        return Fault(Reason.SHARED, problem)
    if found := mismatch(model.specs, header.tensors):
        return Fault(Reason(found.aspect), found.message)
    if not header.codecs and (found := invalid_specs(header.tensors)):
        return Fault(Reason(found.aspect), found.message)
    if problem := strategy.problem_with(header.scalars):
        return Fault(Reason.SCALARS, problem)
    return None


def examine_initial(header: pb.UpdateHeader, directory: Path | None = None) -> Fault | None:
    """Return the fault of initial weights that their header shows, or ``None``.

    ``directory``: where checkpoints are stored.
    """
    if problem := bounds.problem_with_names(header) or bounds.problem_with_header(header):
        return Fault(Reason.BOUNDS, problem)
    if header.codecs:
        return Fault(Reason.CODEC, "initial weights must be sent raw")
    if RESERVED_NAME in {*(spec.name for spec in header.tensors), *(view.name for view in header.views)}:
        return Fault(Reason.UNKNOWN_TENSOR, f"a tensor cannot be called {RESERVED_NAME}: safetensors keeps that name")
    if found := invalid_specs(header.tensors):
        return Fault(Reason(found.aspect), found.message)
    if problem := invalid_views(views_of(header.views), header.tensors):
        return Fault(Reason.SHARED, problem)
    problem = bounds.problem_with_room(header, directory)
    return Fault(Reason.SIZE, problem) if problem else None


def examine_values(tensors: State) -> Fault | None:
    """Return the fault of an update's values, or ``None``."""
    found = first_beyond(GREATEST_WEIGHT, tensors)
    if found is None:
        return None
    name, value = found
    if not math.isfinite(value):
        return Fault(Reason.NON_FINITE, f"{name} holds NaN or infinity")
    return Fault(Reason.RANGE, f"{name} holds {value:.3g}, which is beyond 2**60: too large to be averaged")


def examine_frozen(tensors: State, base: State, frozen: Collection[str]) -> Fault | None:
    """Return the fault of an update that changes ``frozen`` parameters, or ``None``.

    With differential privacy these get no noise, so they must not change.
    """
    changed = [name for name in tensors if name in frozen and not torch.equal(tensors[name], base[name])]
    if not changed:
        return None
    return Fault(
        Reason.FROZEN,
        f"{changed[0]} required no gradient when training began, and has changed since: with differential privacy what"
        " is frozen stays frozen; unfreeze it before the first round",
    )


def fault_of(error: TransferError) -> Fault:
    """Return the fault that corresponds to a failed reception."""
    match error:
        case ChecksumError():
            reason = Reason.CHECKSUM
        case TruncatedError():
            reason = Reason.TRUNCATED
        case StorageError():
            reason = Reason.STORAGE
        case NonFiniteError():
            reason = Reason.NON_FINITE
        case CodecError():
            reason = Reason.CODEC
        case _:
            reason = Reason.MALFORMED
    return Fault(reason, str(error))


def reply(verdict: "pb.PushReply.Verdict.ValueType", message: str, reason: Reason | None = None) -> pb.PushReply:
    """Return the reply to an update that is not accepted. STALE, CLOSED and FENCED imply the reason."""
    return pb.PushReply(verdict=verdict, message=message, reason=reason or _OF_VERDICT[verdict])


def _as_signed(number: int) -> str:
    if number < 1 << 63:
        return f" and at most 2**53, not {number}" if number else ""
    return f", not {number - (1 << 64)}"
