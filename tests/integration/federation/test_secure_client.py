"""The client library under secure aggregation: real processes, with what must work as without it."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from isthmus_contracts import identities
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.wire.departures import Departure

from .conftest import Federation, eventually
from .secure_parties import SECURE, Parties
from .subprocess_job import Forked
from .test_children import EXPECTED, FORKS
from .test_distributed import SCRIPT as RANKS
from .test_faults import trained

Make = Callable[..., Federation]
CLIENTS = 3


def start(job: Federation, script: Path, parties: Parties | None = None, **env: str) -> list[Forked]:
    """Start the job's aggregator and clients, each with an audit log of its own."""
    job.start_aggregator()
    parties = parties or Parties()
    return [
        parties.start_client(job, script, index, 0, "", ISTHMUS_AUDIT_DIR=f"audit-{index}", **env)
        for index in range(CLIENTS)
    ]


def audit(job: Federation, index: int) -> list[Departure]:
    """Return the lines of a client's audit log, all of which must be valid."""
    path = job.directory / f"audit-{index}" / identities.AUDIT_FILE
    lines = [Departure.parse(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    found = [line for line in lines if line is not None]
    assert len(found) == len(lines)
    return found


def final(job: Federation) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(job.state / "model.pt", weights_only=True)
    return state


@pytest.mark.parametrize(
    "strategy",
    [{"algorithm": "FedAvg"}, {"algorithm": "FedNova"}, {"algorithm": "SCAFFOLD"}],
    ids=["FedAvg", "FedNova", "SCAFFOLD"],
)
def test_the_model_is_the_one_without_masks(federation: Make, script: Path, strategy: dict[str, Any]) -> None:
    """Clients report steps and travel under masks, as they report them in clear."""
    models = []
    for privacy in (SECURE, {}):
        # A clip that no change exceeds; the numbers of steps differ.
        wide = {"secureAggregation": {**SECURE["secureAggregation"], "clip": "4", "maxExamples": 30}} if privacy else {}
        job = federation(CLIENTS, 3, strategy=strategy, privacy=wide)
        job.start_aggregator()
        parties = Parties()
        clients = [
            parties.start_client(job, script, index, STEPS=str(2 + index), NORM="layer") for index in range(CLIENTS)
        ]
        job.wait_for_completion()
        assert [client.wait() for client in clients] == [0] * CLIENTS, job.log("client-0-0")
        models.append(final(job))
    masked, clear = models
    assert list(masked) == list(clear)
    for name, tensor in clear.items():
        torch.testing.assert_close(masked[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_what_random_coordinates_leave_out_is_kept_from_round_to_round(
    federation: Make, script: Path, tmp_path: Path
) -> None:
    few = {**SECURE["secureAggregation"], "bits": 16, "maxExamples": 30, "rotation": True, "keep": "0.5"}
    job = federation(CLIENTS, 2, privacy={"secureAggregation": few})
    clients = start(job, script, WIDTH="40", ISTHMUS_SCRATCH=str(tmp_path / "scratch"))
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * CLIENTS, job.log("client-0-0")
    for index in range(CLIENTS):
        with safe_open(tmp_path / "scratch" / f"residual-pool-{index}.safetensors", framework="pt") as file:
            assert int(file.metadata()["round"]) >= 1
            assert {name.partition("/")[2] for name in file.keys()} == {"4.weight"}  # noqa: SIM118 - of 40 x 40


def test_all_that_leaves_is_masked_and_in_the_audit_log(federation: Make, script: Path) -> None:
    job = federation(CLIENTS, 2, privacy=SECURE)
    clients = start(job, script)
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * CLIENTS, job.log("client-0-0")
    lines = [audit(job, index) for index in range(CLIENTS)]
    in_clear = [line for one in lines for line in one if line.protection == "none"]
    assert [(line.what, line.round) for line in in_clear] == [("initial-weights", 0)]
    for index, one in enumerate(lines):
        masked = [line for line in one if line.protection == "secure-aggregation"]
        assert [(line.what, line.round) for line in masked] == [("update", 1), ("update", 2), ("evaluation", 3)]
        assert all(line.size and len(line.sha256) == 64 and line.decision == "sent" for line in one)
        assert {(line.job, line.pool, line.index) for line in one} == {("5d2c", "pool", index)}
        incarnations = [line.incarnation for line in masked]
        assert incarnations == sorted(set(incarnations))
    # Equal updates would have other masks: no two clients send the same bytes.
    digests = [line.sha256 for one in lines for line in one]
    assert len(set(digests)) == len(digests)


def test_a_site_that_requires_masks_trains_nothing_without(federation: Make, script: Path) -> None:
    job = federation(CLIENTS, 2)
    clients = start(job, script, Parties(required=True))
    assert [client.wait() for client in clients] == [1] * CLIENTS
    reason = (
        "this site requires secure aggregation (trust.json: required), and the aggregator offers work without it:"
        " add spec.privacy.secureAggregation to the job's manifest if it is missing there"
    )
    for index in range(CLIENTS):
        assert job.log(f"client-{index}-0").splitlines()[-1] == f"isthmus.FederationError: {reason}"
        assert not (job.directory / f"trained-{index}").exists()
        refused = audit(job, index)[-1]
        assert (refused.decision, refused.what, refused.round, refused.reason) == ("refused", "update", 1, reason)
    failures = eventually("the failures are known", lambda: list(job.status().pools[0].failures))
    assert failures[0].message == f"FederationError: {reason}"


def test_a_metric_without_a_bound_stays_here_with_one_line(federation: Make, script: Path) -> None:
    job = federation(CLIENTS, 3, privacy={"secureAggregation": {}})
    clients = start(job, script)
    status = job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * CLIENTS, job.log("client-0-0")
    assert {metric.name for metric in status.metrics} == {"train_loss"}
    (line,) = [line for line in job.log("client-0-0").splitlines() if "score" in line]
    assert "spec.privacy.secureAggregation.metrics" in line


def test_values_beyond_their_bounds_are_warned_of_once(federation: Make, script: Path) -> None:
    bounds = {"secureAggregation": {"metrics": {"score": "10", "loss": "0.001"}, "maxExamples": 12}}
    job = federation(CLIENTS, 3, privacy=bounds)
    clients = start(job, script)
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * CLIENTS, job.log("client-0-0")
    log = job.log("client-2-0")
    loss = "metric.loss is beyond its bounds, -0.001 to 0.001 (spec.privacy.secureAggregation.metrics)"
    assert log.count(f"{loss}: it counts as the bound") == 1
    examples = "num_examples is above the largest weight of this round, 12 (spec.privacy.secureAggregation.maxExamples)"
    assert log.count(f"{examples}: it counts as the bound") == 1


def test_too_few_parties_end_the_clients_with_the_reason(federation: Make, script: Path) -> None:
    job = federation(CLIENTS, 2, privacy=SECURE)
    clients = start(job, script, Parties(min_parties=2))
    assert [client.wait() for client in clients] == [1] * CLIENTS
    (line,) = [line for line in job.log("client-0-0").splitlines() if line.startswith("isthmus.")]
    assert line.startswith("isthmus.FederationError: secure aggregation refused (parties): ")
    assert not [line for line in audit(job, 0) if line.what == "update"]


def test_two_ranks_are_one_client(federation: Make) -> None:
    job, parties = federation(CLIENTS, 3, privacy={"secureAggregation": {"metrics": {"rank": "1"}}}), Parties()
    job.start_aggregator()
    clients = []
    for index in range(CLIENTS):
        environment = {**job.client_environment(index), "DATA": str(index)}
        parties.files(job.directory / f"client-{index}-0")
        if index:
            clients.append(job.start(f"client-{index}", [RANKS], environment))
    for rank, environment in enumerate((job.client_environment(0), {})):
        parties.files(job.directory / "client-0-0")
        group = {"RANK": str(rank), "RANKS": "2", "DATA": "0"}
        clients.append(job.start(f"rank-{rank}", [RANKS], {**group, **environment}))
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * 4, job.log("rank-0") + job.log("rank-1")
    seen = [(job.directory / f"client-0-rank-{rank}-of-2").read_text() for rank in range(2)]
    assert seen[0] == seen[1] and seen[0].count("steps") == 3


def test_children_end_by_themselves_and_the_round_goes_on(federation: Make, tmp_path: Path) -> None:
    """The threads of secure aggregation hold locks at some of the forks."""
    script = tmp_path / "forks.py"
    script.write_text(FORKS)
    job = federation(CLIENTS, 1, privacy=SECURE)
    clients = start(job, script)
    assert [client.wait() for client in clients] == [0] * CLIENTS, job.log("client-0-0")
    assert job.wait_for_completion().completed_rounds == 1
    lines = job.log("client-0-0").splitlines()
    assert [line for line in lines if line in EXPECTED] == EXPECTED


def test_a_client_that_waits_for_masks_stops_when_told(federation: Make, script: Path) -> None:
    """One client is frozen before the keys are exchanged, so that the others wait for them with trained updates."""
    slow = {"secureAggregation": {**SECURE["secureAggregation"], "phaseDeadlineSeconds": 3600}}
    job, parties = federation(CLIENTS, 2, privacy=slow), Parties()
    job.start_aggregator()
    # The quorum is not there yet: the frozen client is connected when the first instance begins.
    frozen = parties.start_client(job, script, 2)
    eventually("it is connected", lambda: job.status().pools[0].connected == 1)
    frozen.send_signal(signal.SIGSTOP)
    clients = [parties.start_client(job, script, index) for index in range(2)]
    try:
        line = "waiting for secure aggregation: the other clients' keys and shares are not here yet"
        eventually("it says why it waits", lambda: line in job.log("client-0-0"))
        clients[0].send_signal(signal.SIGTERM)
        assert clients[0].wait() == 143, job.log("client-0-0")
        assert trained(job, 0).total() == 1
        assert job.log("client-0-0").count("waiting for secure aggregation") == 1
        assert "update not used: the process was told to stop" in job.log("client-0-0")
    finally:
        frozen.send_signal(signal.SIGCONT)


def test_an_update_is_masked_again_after_a_restart(federation: Make, script: Path) -> None:
    """A restarted aggregator begins a new instance; the update that the first one took is not trained again."""
    job = federation(CLIENTS, 3, privacy=SECURE)
    parties = Parties()
    job.start_aggregator()
    clients = []
    for index in range(CLIENTS):
        environment = job.client_environment(index, HOLD="9" if index else "2", ISTHMUS_AUDIT_DIR=f"audit-{index}")
        parties.files(job.directory / f"client-{index}-0")
        clients.append(job.start(f"client-{index}-0", [script], environment))
    job.wait_for(lambda status: status.current_round == 2 and status.submitted == 2)
    job.kill_aggregator()
    job.start_aggregator()
    job.let_go()
    status = job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * CLIENTS, job.log("client-1-0")
    assert status.phase == pb.FederationStatus.COMPLETE
    for index in range(CLIENTS):
        assert trained(job, index) == {1: 1, 2: 1, 3: 1}
    twice = [line for line in audit(job, 1) if (line.what, line.round) == ("update", 2)]
    assert len(twice) == 2
    assert len({line.incarnation for line in twice}) == len({line.sha256 for line in twice}) == 2


def test_a_script_that_fails_is_reported(federation: Make, script: Path) -> None:
    job = federation(CLIENTS, 2, privacy=SECURE)
    clients = start(job, script, BREAK="1:no such column")
    assert [client.wait() for client in clients] == [1] * CLIENTS
    failures = eventually("the failures are known", lambda: list(job.status().pools[0].failures))
    assert failures[0].message == "ValueError: no such column"
