"""Termination message: the final status of an aggregator, within the kubelet's limit. Pure."""

from google.protobuf.json_format import MessageToJson

from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.text import one_line

MOST_BYTES = 4096
"""Limit of Kubernetes. It cuts longer messages, which would then be invalid JSON."""
# Bounds of the status message. Characters.
_LONGEST_MESSAGE = 1000
_SHORTEST_MESSAGE = 100


def termination_message(status: pb.FederationStatus) -> str:
    """Return a status as JSON of at most :data:`MOST_BYTES` bytes in UTF-8.

    If it does not fit, parts are left out: first the metrics, then tracebacks, failures and pools. Then the message is
    cut.
    """
    short = pb.FederationStatus()
    short.CopyFrom(status)
    short.message = one_line(status.message, _LONGEST_MESSAGE)
    if _fits(short):
        return _text(short)
    del short.metrics[:]
    if not _fits(short):
        for pool in short.pools:
            for failure in pool.failures:
                failure.traceback = ""
    if not _fits(short):
        for pool in short.pools:
            del pool.failures[:]
    if not _fits(short):
        del short.pools[:]
    length = _LONGEST_MESSAGE
    while not _fits(short) and length > _SHORTEST_MESSAGE:  # characters may take several bytes
        length -= _SHORTEST_MESSAGE
        short.message = one_line(status.message, length)
    if not _fits(short):
        short = pb.FederationStatus(phase=status.phase, message=short.message)
    return _text(short)


def _text(status: pb.FederationStatus) -> str:
    return MessageToJson(status, indent=None, ensure_ascii=False)


def _fits(status: pb.FederationStatus) -> bool:
    return len(_text(status).encode()) <= MOST_BYTES
