"""Aggregators that treat the clients of a secure sum differently, so that one update is left in it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from . import malicious_aggregator
from .conftest import Federation, eventually
from .secure_parties import SECURE, Parties
from .test_faults import records

Make = Callable[..., Federation]


@pytest.mark.parametrize("lie", sorted(malicious_aggregator.LIES))
def test_clients_with_other_settings_give_nothing_away(
    federation: Make, script: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    job, parties = federation(3, 2, privacy=SECURE, strategy={"algorithm": "FedProx"}), Parties()
    start = job.start
    program = Path(malicious_aggregator.__file__ or "")

    def malicious(name: str, arguments: list[object], env: dict[str, str]) -> object:
        if name == "aggregator":
            arguments = [program, lie, *arguments[2:]]
        return start(name, arguments, env)

    monkeypatch.setattr(job, "start", malicious)
    job.start_aggregator()
    clients = [parties.start_client(job, script, index) for index in range(3)]
    # Those that were lied to, or the one that was not, have another basis than the terms that all sign.
    eventually(
        "a client refuses",
        lambda: any("secure aggregation refused (base)" in job.log(f"client-{index}-0") for index in range(3)),
    )
    refusing = [index for index in range(3) if "with other settings" in job.log(f"client-{index}-0")]
    assert [clients[index].wait() for index in refusing] == [1] * len(refusing)
    assert not (job.state / "rounds.jsonl").exists()


@pytest.mark.parametrize("algorithm", ["FedProx", "SCAFFOLD", "FedAdam"])
def test_an_honest_aggregator_gives_all_clients_the_same(federation: Make, script: Path, algorithm: str) -> None:
    """Settings that change from round to round, auxiliary tensors, and a model that is sent compressed."""
    job = federation(
        3, 3, privacy=SECURE, strategy={"algorithm": algorithm}, compression={"download": "Delta+Int8"},
    )  # fmt: skip
    parties = Parties()
    job.start_aggregator()
    clients = [parties.start_client(job, script, index) for index in range(3)]
    status = job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * 3, job.log("client-0-0")
    assert status.completed_rounds == 3 and [record["updates"] for record in records(job)] == [3] * 3
