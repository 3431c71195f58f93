"""When too few clients are left for a run to complete, and the message."""

from pathlib import Path
from typing import Any

import pytest

from isthmus.local.plan import local_clients
from isthmus.local.roster import Roster, counted
from isthmus_contracts.manifests.manifest import FederatedJob, parse_spec
from isthmus_contracts.pb import federation_pb2 as pb

LOGS = Path("runs/demo/logs")
WAITING, TRAINING = pb.FederationStatus.WAITING, pb.FederationStatus.TRAINING


def roster(*roles: str, **spec: Any) -> Roster:
    """Return a roster with one client, in its own pool, for each role."""
    pools = [{"name": f"p{number}", "cloud": {}, "replicas": 1, "role": role} for number, role in enumerate(roles)]
    parsed = parse_spec({"rounds": 1, "task": {"image": "i", "command": ["true"]}, "pools": pools, **spec})
    job = FederatedJob("demo", "default", parsed)
    return Roster(job, local_clients(job))


@pytest.mark.parametrize(("number", "text"), [(0, "0 clients"), (1, "1 client"), (2, "2 clients")])
def test_numbers_agree_with_their_nouns(number: int, text: str) -> None:
    assert counted(number, "client") == text
    assert counted(2, "process") == "2 processes"


def test_a_run_fails_when_its_quorum_can_never_be_met() -> None:
    clients = roster("Train", "Train", "Train")
    clients.note_failure(clients.clients[0], "ValueError: no data")
    clients.failed.add(clients.clients[0])
    assert clients.shortage(WAITING) == ""
    clients.failed.add(clients.clients[1])
    assert (
        clients.shortage(WAITING) == "1 of 3 clients remain (2 failed) where a round needs 2; p0-0: ValueError: no data"
    )
    assert clients.shortage(pb.FederationStatus.EVALUATING) == ""


def test_clients_that_only_evaluate_make_no_round() -> None:
    clients = roster("Train", "Train", "Evaluate", "Evaluate")
    clients.failed.update(clients.clients[2:])
    assert clients.shortage(WAITING) == clients.shortage(TRAINING) == ""
    clients.failed.add(clients.clients[0])
    assert clients.shortage(WAITING) == "1 of 2 clients that train remain (1 failed) where a round needs 2"


def test_scripts_that_end_at_once_are_asked_for_their_loop() -> None:
    clients = roster("Train", "Train")
    clients.left.update(clients.clients)
    assert clients.shortage(WAITING) == (
        "0 of 2 clients remain (2 ended without an error) where a round needs 2;"
        " does the script loop over isthmus.rounds() until training is complete?"
    )


def test_a_round_in_progress_needs_fewer_than_a_new_one() -> None:
    clients = roster("Train", "Train", selection={"minClients": 2}, stragglers={"minUpdates": 1})
    clients.left.add(clients.clients[0])
    assert clients.shortage(TRAINING) == ""
    assert clients.shortage(WAITING) != ""


def test_the_first_round_waits_for_clients_that_may_still_connect() -> None:
    clients = roster("Train", "Train", "Evaluate")
    assert clients.expected == 3
    clients.failed.add(clients.clients[0])
    clients.left.add(clients.clients[2])
    assert clients.expected == 1
    assert roster("Train", "Train", selection={"minClients": 1}).expected == 0  # the manifest sets minClients


def test_a_failure_that_all_clients_share() -> None:
    clients = roster("Train", "Train")
    clients.note_failure(clients.clients[0], "ImportError: x")
    assert clients.common_failure == ""
    clients.note_failure(clients.clients[0], "ImportError: y")  # a later failure of the same client
    clients.note_failure(clients.clients[1], "ImportError: x")
    assert clients.common_failure == "ImportError: x"
    other = roster("Train", "Train")
    other.note_failure(other.clients[0], "ImportError: x")
    other.note_failure(other.clients[1], "KilledByNobody")
    assert other.common_failure == ""


def test_a_long_wait_names_how_many_have_not_come_and_where_to_look() -> None:
    enough = roster("Train", "Train", selection={"minClients": 2})
    missing = "still waiting for {} to call isthmus.rounds(); the logs are in runs/demo/logs"
    assert enough.advice(0, 1, LOGS) == [missing.format("2 clients")]
    assert enough.advice(1, 1, LOGS) == [missing.format("1 client")]
    assert enough.advice(2, 1, LOGS) == []

    every = roster("Train", "Train", "Train")
    assert every.advice(2, 4, LOGS) == [
        missing.format("1 client"),
        "with selection.minClients: 2 in the manifest, round 4 starts without the others",
    ]
    every.failed.add(every.clients[0])
    assert every.advice(1, 4, LOGS) == [missing.format("1 client")]
