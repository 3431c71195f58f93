"""Secure aggregation whose aggregator is killed at every point: no mask covers two inputs, nothing is trained twice."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import Federation
from .nursery import Nursery
from .secure_parties import SECURE, Parties
from .test_kill_anywhere import passed, run, verify
from .wire_recorder import check_one_input_per_mask

Make = Callable[..., Federation]
CLIENTS = 3
pytestmark = pytest.mark.timeout(1800)  # more than a hundred processes, one after the other

# Points of every phase, each of which ends a process before and after it. The last ones are of the final evaluation.
NAMED = (
    "Incarnations.next", "SecureSum.begin", "SecureRounds.start", "ServerProtocol.receive", "SecureRounds.accept",
    "Instance.freeze", "JournalFile.write", "Instance.announce", "ServerProtocol.plan", "AccumulatorFile.private",
    "SecureSum.unmask", "SecureSum.finish", "CheckpointStore.save", "SecureRounds.end_round", "Client.send",
)  # fmt: skip


def test_at_every_point_of_a_round(federation: Make, script: Path, nurseries: tuple[Nursery, Nursery]) -> None:
    """Each aggregator is killed a few points later than the previous one, and then each at a point of a given name."""
    rounds, parties = 100, Parties()
    undisturbed, killed = (federation(CLIENTS, rounds, privacy=SECURE) for _ in range(2))
    options = {"clients": CLIENTS, "prepare": parties.files, "RECORD": "yes"}
    run(undisturbed, script, nurseries, [], **options)  # type: ignore[arg-type]
    begun = [number for number, point in enumerate(passed(undisturbed)) if point == "before SecureRounds.start"]
    longest = begun[2] - begun[1]
    named = [f"{side} {name}" for name in NAMED for side in ("before", "after")]
    kills = [*range(5, longest, 2), *named]
    points = run(killed, script, nurseries, kills, **options)  # type: ignore[arg-type]
    assert points[-len(named) :] == named
    assert len(set(points)) > 30
    models = [verify(job, rounds, CLIENTS) for job in (undisturbed, killed)]
    assert all(models)
    assert check_one_input_per_mask(undisturbed.directory) == rounds + 1  # and the final evaluation
    assert check_one_input_per_mask(killed.directory) > rounds + 1
    _alike(undisturbed, killed)


def _alike(first: Federation, second: Federation) -> None:
    """Assert that both models are the same, up to the random rounding of the updates."""
    one, other = (load_file(job.state / "model.safetensors") for job in (first, second))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0.05, atol=0.05)
