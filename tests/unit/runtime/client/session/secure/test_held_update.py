"""Warnings about numbers that cannot be masked as they are."""

import logging

import pytest
import torch

from isthmus.client.session.secure.held_update import Numbers, Quantiser, Work
from isthmus.secure_aggregation.layout import Parameters, make_layout
from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa

SPEC = parse_spec(
    {
        "rounds": 2,
        "task": {"image": "i", "command": ["true"]},
        "privacy": {"secureAggregation": {"maxExamples": 100}},
        "pools": [{"name": "cloud", "replicas": 4, "cloud": {}}],
    }
)
BASE = {"w": torch.zeros(4)}
WORK = Work(sa.SecureBegin.TRAIN, 1, 0)


def held(quantiser: Quantiser, numbers: Numbers) -> None:
    layout = make_layout(Parameters.of(SPEC), BASE)
    quantiser.hold(WORK, layout, "digest", dict(BASE), {"w": torch.full((4,), 0.01)}, numbers, consume=False)


def test_a_metric_without_a_bound_stays_here_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    quantiser = Quantiser()
    evaluation = pb.Evaluation(metrics={"accuracy": 0.5, "f1": 0.5}, num_examples=10)
    for _ in range(2):
        held(quantiser, Numbers(10, {"loss": 1.0, "gradient": 3.0}, evaluation=evaluation))
    assert [record.message for record in caplog.records] == [
        f"secure aggregation: the metric {name} has no bound and is not sent: to have its mean over all clients, add"
        " its largest absolute value to spec.privacy.secureAggregation.metrics"
        for name in ("f1", "gradient")
    ]


def test_numbers_beyond_their_bounds_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    quantiser = Quantiser()
    for _ in range(2):
        held(quantiser, Numbers(1000, {"loss": 1e6}))
    first, second = (record.message for record in caplog.records)
    assert "loss is beyond its bounds, -100 to 100 (spec.privacy.secureAggregation.metrics)" in first
    assert "num_examples is above the largest weight of this round, 100" in second
    assert first.endswith(": it counts as the bound") and second.endswith(": it counts as the bound")
