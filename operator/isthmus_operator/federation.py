"""Reads the aggregator's status, from a call or from its termination message."""

from google.protobuf import json_format

from isthmus_contracts.pb import federation_pb2 as pb

from .observed import FederationView, Metric, ModelView, PrivacyView
from .text import last_lines


def view(status: pb.FederationStatus) -> FederationView:
    """Cuts the aggregator's status down to what the plan looks at."""
    failures = {}
    for pool in status.pools:
        if pool.failures:
            newest = max(pool.failures, key=lambda failure: failure.time)
            failures[pool.name] = last_lines(newest.traceback) or newest.message
    return FederationView(
        phase=pb.FederationStatus.Phase.Name(status.phase),
        message=status.message,
        current_round=status.current_round,
        completed_rounds=status.completed_rounds,
        total_rounds=status.total_rounds,
        connected={pool.name: pool.connected for pool in status.pools},
        failures=failures,
        metrics=tuple(_metric(metric) for metric in status.metrics),
        best=_metric(status.best) if status.best.name else None,
        model=ModelView(status.model.path, status.model.round, status.model.sha256) if status.model.path else None,
        privacy=_privacy(status.privacy) if status.HasField("privacy") else None,
    )


def from_termination(message: str) -> FederationView | None:
    """Reads a termination message; None where it is not the aggregator's own (a traceback, or cut off)."""
    if not message.lstrip().startswith("{"):
        return None
    try:
        status = json_format.Parse(message, pb.FederationStatus(), ignore_unknown_fields=True)
    except (json_format.ParseError, ValueError):
        return None
    return view(status) if status.phase else None


def _metric(value: pb.MetricValue) -> Metric:
    return Metric(value.name, value.value, value.round)


def _privacy(status: pb.PrivacyStatus) -> PrivacyView:
    return PrivacyView(status.epsilon, status.delta, status.rounds, status.spent)
