"""A client with two gloo ranks, in separate processes, beside an ordinary client."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isthmus_contracts.pb import federation_pb2 as pb

from .conftest import Federation, eventually
from .subprocess_job import Forked

Make = Callable[..., Federation]
Ranks = list[Forked]
SCRIPT = Path(__file__).with_name("ranks.py")


def start_ranks(job: Federation, wrong_certificate: bool = False, **env: str) -> Ranks:
    """Start client 0 as two ranks, of which the second has no environment of the federation."""
    credentials = job.credentials(uid="other") if wrong_certificate else None
    environments = [job.client_environment(0, credentials=credentials), {}]
    return [
        job.start(f"rank-{rank}", [SCRIPT], {"RANK": str(rank), "RANKS": "2", "DATA": "0", **environment, **env})
        for rank, environment in enumerate(environments)
    ]


def start_client(job: Federation, index: int) -> Forked:
    """Start an ordinary client of one process."""
    return job.start(f"client-{index}", [SCRIPT], {**job.client_environment(index), "DATA": str(index)})


def exit_codes(ranks: Ranks) -> list[int]:
    return [rank.wait() for rank in ranks]


def logs(job: Federation) -> str:
    return f"{job.log('rank-0')}\n---- rank 1\n{job.log('rank-1')}"


def final(job: Federation) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(job.state / "model.pt", weights_only=True)
    return state


@pytest.mark.parametrize(
    "strategy",
    [{"algorithm": "SCAFFOLD"}, {"algorithm": "FedProx", "parameters": {"mu": "0.5"}}],
    ids=["SCAFFOLD", "FedProx"],
)
def test_two_ranks_train_what_one_process_would(federation: Make, strategy: dict[str, object]) -> None:
    results = []
    for ranks in (2, 1):
        job = federation(2, 3, strategy=strategy)
        job.start_aggregator()
        clients = start_ranks(job) if ranks == 2 else [start_client(job, 0)]
        # The initial weights are client 0's.
        eventually("client 0 is there", lambda job=job: job.status().pools[0].connected == 1)  # type: ignore[misc]
        clients.append(start_client(job, 1))
        status = job.wait_for_completion()
        assert exit_codes(clients) == [0] * len(clients)
        results.append(final(job))
        if ranks == 2:
            seen = [(job.directory / f"client-0-rank-{rank}-of-2").read_text() for rank in range(2)]
            assert seen[0] == seen[1]
            assert seen[0].count("steps") == 3
            metrics = {metric.name: metric.value for metric in status.metrics}
            assert metrics["rank"] == 0.0
    assert list(results[0]) == list(results[1])
    for name, tensor in results[1].items():
        torch.testing.assert_close(results[0][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_a_signal_to_any_rank_ends_the_wait_of_both(federation: Make) -> None:
    job = federation(2, 3)
    job.start_aggregator()
    ranks = start_ranks(job, TIMEOUT="5")
    # They do not wait in a collective, which would have timed out here before the offer that is never made.
    eventually("it is connected", lambda: job.status().pools[0].connected == 1)
    enough = time.monotonic() + 7
    eventually("it has waited longer than that", lambda: time.monotonic() > enough)
    eventually("rank 1 handles the signal", lambda: ranks[1].handles(signal.SIGTERM))
    ranks[1].send_signal(signal.SIGTERM)
    assert exit_codes(ranks) == [143, 143], logs(job)


def test_both_ranks_stop_after_the_same_step(federation: Make) -> None:
    job = federation(1, 3)
    job.start_aggregator()
    ranks = start_ranks(job, ENDLESS="yes")
    eventually("rank 1 trains", (job.directory / "client-0-rank-1-of-2").exists)
    ranks[1].send_signal(signal.SIGTERM)
    assert exit_codes(ranks) == [143, 143], logs(job)
    seen = [(job.directory / f"client-0-rank-{rank}-of-2").read_text() for rank in range(2)]
    assert seen[0] == seen[1]
    assert "steps" in seen[0]
    eventually("the update counts", lambda: job.status().completed_rounds == 1)


@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_rank_is_killed_the_other_fails(federation: Make, killed: int) -> None:
    job = federation(1, 3)
    job.start_aggregator()
    ranks = start_ranks(job, ENDLESS="yes", SILENCE="8")
    eventually("rank 1 trains", (job.directory / "client-0-rank-1-of-2").exists)
    ranks[killed].kill()
    assert ranks[1 - killed].wait() == 1, logs(job)
    if killed == 1:
        eventually("the failure is known", lambda: job.status().pools[0].failed == 1)


def test_a_rank_that_waits_notices_the_death_of_rank_0(federation: Make) -> None:
    job = federation(2, 3)
    job.start_aggregator()
    ranks = start_ranks(job)
    eventually("it is connected", lambda: job.status().pools[0].connected == 1)
    ranks[0].kill()
    assert ranks[1].wait() == 1
    assert "another rank of this client has gone" in job.log("rank-1")


def test_a_refusal_reaches_both(federation: Make) -> None:
    job = federation(1, 1)
    job.start_aggregator()
    ranks = start_ranks(job, wrong_certificate=True)
    assert exit_codes(ranks) == [1, 1], logs(job)
    for name in ("rank-0", "rank-1"):
        assert "the certificate does not belong to this client of this job" in job.log(name)
    assert job.status().phase == pb.FederationStatus.WAITING


def test_without_a_certificate_both_say_what_is_missing(federation: Make) -> None:
    job = federation(1, 1)
    job.start_aggregator()
    ranks = start_ranks(job, ISTHMUS_TLS_DIR="/nowhere")
    assert exit_codes(ranks) == [1, 1], logs(job)
    assert "rank 0 of this client has gone: FederationError: cannot read the client's certificate" in job.log("rank-1")


@pytest.mark.parametrize(("rank", "how"), [(0, "BREAK"), (1, "BREAK"), (1, "LEAVE")])
def test_a_rank_that_raises_or_leaves_takes_the_other_along(federation: Make, rank: int, how: str) -> None:
    job = federation(1, 3)
    job.start_aggregator()
    ranks = start_ranks(job, PLAIN="yes", **{how: f"{rank}:2"})
    reason = "ValueError: no such column: age" if how == "BREAK" else "the script has left its loop"
    assert ranks[1 - rank].wait() == 1, logs(job)
    assert ranks[rank].wait() == (1 if how == "BREAK" else 0)
    assert f"rank {rank} of this client has gone: {reason}" in job.log(f"rank-{1 - rank}")
    failure = eventually("the failure is known", lambda: job.status().pools[0].failures)[0]
    assert failure.message.endswith(reason)
