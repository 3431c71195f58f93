"""Secure aggregation with real aggregators and clients."""

from collections.abc import Callable
from pathlib import Path

from .conftest import Federation
from .secure_parties import SECURE, Parties
from .test_faults import records, trained

Make = Callable[..., Federation]


def test_rounds_of_masked_updates(federation: Make, script: Path) -> None:
    job, parties = federation(4, 3, privacy=SECURE), Parties()
    job.start_aggregator()
    clients = [parties.start_client(job, script, index) for index in range(4)]
    status = job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * 4, job.log("client-0-0")
    assert status.completed_rounds == 3
    assert [record["updates"] for record in records(job)] == [4] * 3
    assert all(trained(job, index).total() == 3 for index in range(4))
