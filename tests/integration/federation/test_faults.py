"""Training completes after any process is killed, and nothing is trained or counted twice."""

import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.wire.pki import Authority

from .conftest import DAY, SERVER_NAME, Federation, eventually

Make = Callable[..., Federation]


def trained(job: Federation, client: int) -> Counter[int]:
    """Return how often the client trained each round."""
    return Counter(int(line) for line in (job.directory / f"trained-{client}").read_text().split())


def records(job: Federation) -> list[dict[str, Any]]:
    """Return the newest record of each round, in order."""
    newest = {record["round"]: record for record in map(json.loads, (job.state / "rounds.jsonl").open())}
    return [newest[number] for number in sorted(newest)]


def updates(job: Federation) -> dict[int, int]:
    return {record["round"]: record["updates"] for record in records(job)}


def test_the_aggregator_killed_again_and_again(federation: Make, script: Path) -> None:
    job = federation(2, 12)
    job.start_aggregator()
    clients = [job.start_client(script, index, PAUSE="0.15", HOLD="10") for index in range(2)]
    for number in (2, 5, 8):
        job.wait_for_round(number)
        job.kill_aggregator()
        job.start_aggregator()
    job.let_go()
    status = job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0], job.log("client-0-0")
    assert status.completed_rounds == 12
    assert updates(job) == dict.fromkeys(range(1, 13), 2)
    for client in range(2):
        # No client's work is lost: no round was trained twice.
        assert trained(job, client) == Counter(range(1, 13))


def test_a_killed_client_is_replaced_by_a_newer_attempt(federation: Make, script: Path) -> None:
    job = federation(2, 8)
    job.start_aggregator()
    survivor, victim = (job.start_client(script, index, PAUSE="0.1", HOLD="6") for index in range(2))
    job.wait_for_round(3)
    victim.kill()
    replacement = job.start_client(script, 1, attempt=1)
    job.let_go()
    job.wait_for_completion()
    assert [survivor.wait(), replacement.wait()] == [0, 0]
    assert updates(job) == dict.fromkeys(range(1, 9), 2)


def test_an_older_attempt_is_fenced(federation: Make, script: Path) -> None:
    job = federation(1, 100_000)
    job.start_aggregator()
    old = job.start_client(script, attempt=1, PAUSE="0.05")
    job.wait_for_round(2)
    new = job.start_client(script, attempt=2, PAUSE="0.05")
    assert old.wait() == 1
    assert "has taken over" in job.log("client-0-1")
    before = job.status().completed_rounds
    job.wait_for_round(before + 2)
    assert new.poll() is None


def test_an_hpc_client_hands_its_update_in_before_its_next_attempt_takes_over(federation: Make, script: Path) -> None:
    hpc = {"name": "pool", "replicas": 2, "hpc": {"siteRef": {"name": "s"}, "environment": "e"}}
    job = federation(2, 6, pools=[hpc])
    job.start_aggregator()
    other = job.start_client(script, 1)
    old = job.start_client(script, 0, PAUSE="3")
    job.wait_for_round(2)
    new = job.start_client(script, 0, attempt=1)
    job.wait_for_completion()
    assert [old.wait(120), new.wait(120), other.wait(120)] == [1, 0, 0]
    assert "has taken over" in job.log("client-0-0")
    assert updates(job) == dict.fromkeys(range(1, 7), 2)
    # No round was trained by both.
    assert trained(job, 0) == Counter(range(1, 7))


def test_a_script_that_raises_shows_its_traceback_and_the_round_goes_on(federation: Make, script: Path) -> None:
    job = federation(2, 5, stragglers={"minUpdates": 1}, selection={"minClients": 1})
    job.start_aggregator()
    bad = job.start_client(script, 1, BREAK="1:no such column: age")
    eventually("the failure is known", lambda: job.status().pools[0].failed == 1)
    good = job.start_client(script, 0)
    assert bad.wait() == 1
    status = job.wait_for_completion()
    assert good.wait() == 0
    failure = status.pools[0].failures[0]
    assert (failure.index, failure.message) == (1, "ValueError: no such column: age")
    assert "raise ValueError(exception)" in failure.traceback
    assert "ValueError: no such column: age" in job.log("client-1-0")


def test_an_update_with_nan_is_refused_and_the_run_goes_on(federation: Make, script: Path) -> None:
    job = federation(2, 4, stragglers={"minUpdates": 1})
    job.start_aggregator()
    clients = [job.start_client(script, 0, HOLD="4"), job.start_client(script, 1, NAN="2")]
    job.wait_for_round(3)
    assert 'isthmus_updates_total{job="job",namespace="default",pool="pool",result="invalid"} 1.0' in job.metrics()
    job.let_go()
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0]
    assert updates(job) == {1: 2, 2: 1, 3: 2, 4: 2}
    assert "round 2: update refused: 0.weight holds NaN or infinity" in job.log("client-1-0")


def test_the_round_deadline_leaves_a_straggler_behind(federation: Make, script: Path) -> None:
    job = federation(2, 3, stragglers={"minUpdates": 1, "roundDeadlineSeconds": 2})
    job.start_aggregator()
    fast, slow = job.start_client(script, 0), job.start_client(script, 1, PAUSE="600")
    status = job.wait_for_completion()
    assert status.completed_rounds == 3
    assert all(count == 1 for count in updates(job).values())
    assert fast.wait() == 0
    assert slow.poll() is None


def test_sigterm_sets_should_stop_and_a_waiting_client_goes(federation: Make, script: Path) -> None:
    job = federation(2, 3)
    job.start_aggregator()
    client = job.start_client(script, 0)
    eventually("it is connected", lambda: job.status().pools[0].connected == 1)
    eventually("it handles the signal", lambda: client.handles(signal.SIGTERM))
    client.send_signal(signal.SIGTERM)
    assert client.wait() == 143
    eventually("it is gone", lambda: job.status().pools[0].connected == 0)


def test_a_certificate_of_another_authority_cannot_join(federation: Make, script: Path) -> None:
    job = federation(1, 1)
    job.start_aggregator()
    stranger = Federation(job.directory, job.spec, Authority.create("stranger", DAY))
    client = job.start_client(script, credentials=stranger.credentials())
    eventually("the refusal is in the log", lambda: "trying again" in job.log("client-0-0"))
    assert job.status().pools[0].connected == 0
    assert client.poll() is None


@pytest.mark.parametrize("other", [{"pool": "other"}, {"uid": "other"}, {"index": 1}])
def test_a_certificate_for_something_else_is_refused(federation: Make, script: Path, other: dict[str, Any]) -> None:
    job = federation(1, 1)
    job.start_aggregator()
    client = job.start_client(script, credentials=job.credentials(**other))
    assert client.wait() == 1
    assert "the certificate does not belong to this client of this job" in job.log("client-0-0")
    assert job.status().phase == pb.FederationStatus.WAITING


def test_without_a_certificate_the_message_says_what_is_missing(federation: Make, script: Path) -> None:
    job = federation(1, 1)
    job.start_aggregator()
    client = job.start_client(script, ISTHMUS_TLS_DIR="/nowhere")
    assert client.wait() == 1
    assert "cannot read the client's certificate: /nowhere/ca.crt" in job.log("client-0-0")


def test_renewed_certificates_reach_clients_that_run(federation: Make, script: Path) -> None:
    """Clients read renewed certificates when they reconnect, after the earlier ones have expired."""
    job = federation(2, 8)
    job.start_aggregator()
    clients = [job.start_client(script, index, PAUSE="0.1", HOLD="5") for index in range(2)]
    job.wait_for_round(3)
    job.kill_aggregator()
    job.authority = Authority.create("another", DAY)
    job.authority.issue("aggregator", DAY, hosts=[SERVER_NAME]).write(job.directory / "server")
    for index in range(2):
        job.credentials(index).write(job.directory / f"client-{index}-0")
    job.start_aggregator()
    job.let_go()
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0], job.log("client-0-0")
    assert "certificate was renewed" in job.log("client-0-0")
    for client in range(2):
        assert trained(job, client) == Counter(range(1, 9))
