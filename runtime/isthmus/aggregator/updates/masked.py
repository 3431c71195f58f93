"""Validation of masked updates, of which nothing can be checked but the form, the sender and the instance."""

from collections.abc import Sequence

from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb.federation_pb2 import TensorSpec

from ...tensors import mismatch
from . import bounds
from .validation import Fault, Reason, reply

# Bound of a header apart from the tensors' specs. Bytes.
_OTHER_HEADER_BYTES = 4096


def answer(header: pb.UpdateHeader, incarnation: int, *, takes: bool) -> pb.PushReply | None:
    """Return the reply to a masked update that does not belong to the instance in progress; ``None`` for any other.

    ``takes``: the instance takes an update of that client now.
    """
    if header.secure_incarnation and header.secure_incarnation != incarnation:
        message = f"it is masked for instance {header.secure_incarnation}, not for the present one, {incarnation}"
        return reply(pb.PushReply.STALE, message, Reason.INCARNATION)
    if header.secure_incarnation and not takes:
        return reply(pb.PushReply.STALE, "the client is not in the present instance", Reason.NOT_SELECTED)
    return None


def examine(header: pb.UpdateHeader, specs: Sequence[TensorSpec]) -> Fault | None:
    """Return the fault of a masked update that its header shows, or ``None``. ``specs``: the layout's tensors."""
    if not header.secure_incarnation:
        return Fault(Reason.CLEAR, "this job takes masked updates only: privacy.secureAggregation is on")
    if clear := clear_fields(header):
        return Fault(Reason.CLEAR, f"{clear} would travel in clear; with secure aggregation it has to be masked")
    size = sum(spec.ByteSize() + 4 for spec in specs)
    if header.ByteSize() > 2 * size + _OTHER_HEADER_BYTES:
        return Fault(Reason.BOUNDS, f"the header has {header.ByteSize()} bytes, far more than the layout needs")
    if problem := bounds.problem_with_header(header):
        return Fault(Reason.BOUNDS, problem)
    if found := mismatch(specs, header.tensors):
        return Fault(Reason(found.aspect), found.message)
    if list(header.tensors) != list(specs):
        return Fault(Reason.SIZE, "the tensors are not in the layout's order, or their sizes are wrong")
    return None


def clear_fields(header: pb.UpdateHeader) -> str:
    """Return the names of the header's fields that tell something of one client; empty if there are none."""
    told = {
        "num_examples": header.num_examples, "metrics": header.metrics, "scalars": header.scalars,
        "seconds": header.seconds, "codecs": header.codecs, "buffers": header.buffers, "frozen": header.frozen,
        "views": header.views,
    }  # fmt: skip
    return ", ".join(name for name, value in told.items() if value)
