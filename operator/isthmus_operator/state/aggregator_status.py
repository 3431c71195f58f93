"""Conversion of the aggregator's status, from a call or from its termination message.

The aggregator's image belongs to the user, so its texts are made printable and bounded before they are stored.
"""

from google.protobuf import json_format

from isthmus_contracts.pb import federation_pb2 as pb

from ..text import last_lines, one_line
from .observed import FederationView, Metric, ModelView, PrivacyView, SecureView

# The limits of a FederatedJob's status; names may be as long as the aggregator accepts them.
_MOST_METRICS = 256
_LONGEST_NAME = 140
_LONGEST_PATH = 300


def view(status: pb.FederationStatus) -> FederationView:
    """Reduce the aggregator's status to what the plan reads."""
    failures = {}
    for pool in status.pools:
        if pool.failures:
            newest = max(pool.failures, key=lambda failure: failure.time)
            failures[pool.name] = last_lines(newest.traceback) or one_line(newest.message)
    return FederationView(
        phase=pb.FederationStatus.Phase.Name(status.phase),
        message=one_line(status.message),
        current_round=status.current_round,
        completed_rounds=status.completed_rounds,
        total_rounds=status.total_rounds,
        connected={pool.name: pool.connected for pool in status.pools},
        failures=failures,
        metrics=tuple(_metric(metric) for metric in status.metrics[:_MOST_METRICS]),
        best=_metric(status.best) if status.best.name else None,
        model=_model(status.model),
        best_model=_model(status.best_model),
        privacy=_privacy(status.privacy) if status.HasField("privacy") else None,
        secure=_secure(status.secure) if status.HasField("secure") else None,
    )


def from_termination(message: str) -> FederationView | None:
    """Parse a termination message; return None if it is not the aggregator's own (a traceback, or truncated)."""
    if not message.lstrip().startswith("{"):
        return None
    try:
        status = json_format.Parse(message, pb.FederationStatus(), ignore_unknown_fields=True)
    except (json_format.ParseError, ValueError):
        return None
    return view(status) if status.phase else None


def _metric(value: pb.MetricValue) -> Metric:
    return Metric(one_line(value.name, _LONGEST_NAME), value.value, value.round)


def _model(status: pb.ModelStatus) -> ModelView | None:
    if not status.path:
        return None
    return ModelView(one_line(status.path, _LONGEST_PATH), status.round, one_line(status.sha256, 64))


def _privacy(status: pb.PrivacyStatus) -> PrivacyView:
    return PrivacyView(status.epsilon, status.delta, status.rounds, status.spent)


def _secure(status: pb.SecureStatus) -> SecureView:
    return SecureView(
        status.round,
        status.survivors,
        status.dropouts,
        status.parties,
        status.clipped_ratio,
        one_line(status.message),
    )
