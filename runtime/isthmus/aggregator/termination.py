"""The last status of an aggregator, as short as the kubelet wants it. Pure."""

from google.protobuf.json_format import MessageToJson

from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.text import one_line

MOST_BYTES = 4096
"""Kubernetes keeps this much of a termination message, and cuts the rest, which would leave no JSON."""
# Of what the message, the reason, says when everything has to be short. Characters.
_LONGEST_MESSAGE = 1000
_SHORTEST_MESSAGE = 100


def termination_message(status: pb.FederationStatus) -> str:
    """Return a status as JSON of at most :data:`MOST_BYTES` bytes in UTF-8.

    What does not fit is left out: the metrics first, then tracebacks, failures and pools; last, the reason is cut.
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
