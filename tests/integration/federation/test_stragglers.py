"""Slow clients: over-selection, late updates that count, asynchronous rounds; and clients that only evaluate."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import POOL, Federation, eventually
from .test_faults import trained, updates

Make = Callable[..., Federation]


def records(job: Federation) -> list[dict[str, Any]]:
    """Return the last record of each round."""
    lines = map(json.loads, (job.state / "rounds.jsonl").read_text().splitlines())
    return list({record["round"]: record for record in lines}.values())


def test_a_late_update_counts_in_a_later_round(federation: Make, script: Path) -> None:
    job = federation(2, 5, stragglers={"minUpdates": 1, "roundDeadlineSeconds": 3, "late": "Fold"})
    job.start_aggregator()
    fast, slow = job.start_client(script, 0), job.start_client(script, 1, PAUSE="7.5")
    job.wait_for_completion()
    assert fast.wait() == 0
    slow.wait()
    counts = updates(job)
    assert counts[1] == 1  # the round did not wait for the slow client beyond the deadline
    assert 2 in counts.values()  # but its update was counted later
    assert sum(counts.values()) <= 5 + sum(trained(job, 1).values())
    assert max(trained(job, 1).values()) == 1


@pytest.mark.parametrize("algorithm", ["FedBuff", "FedAsync"])
def test_asynchronous_rounds_do_not_wait(federation: Make, script: Path, algorithm: str) -> None:
    strategy = {"algorithm": algorithm, "parameters": {"bufferSize": "2"} if algorithm == "FedBuff" else {}}
    size = 2 if algorithm == "FedBuff" else 1
    job = federation(3, 12, strategy=strategy, stragglers={"minUpdates": size, "maxStaleness": 20})
    job.start_aggregator()
    # The fast clients need not overlap: a round takes far less than half a second on any machine.
    clients = [job.start_client(script, index, PAUSE=pause) for index, pause in enumerate(["0.2", "0.3", "1.5"])]
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0, 0], [job.log(f"client-{i}-0") for i in range(3)]
    assert all(count >= size for count in updates(job).values())
    rounds_of_slow = trained(job, 2)
    assert 1 <= len(rounds_of_slow) < 12
    assert max(rounds_of_slow.values()) == 1
    # Its base model is outdated when it submits.
    assert any(record["stale_updates"] for record in records(job))


def rounds(log: str, verdict: str) -> set[str]:
    """Return the rounds for which a client received this verdict."""
    return set(re.findall(rf"round (\d+): update {verdict}", log))


def test_a_killed_aggregator_counts_late_updates_once(federation: Make, script: Path) -> None:
    strategy = {"algorithm": "FedBuff", "parameters": {"bufferSize": "2"}}
    job = federation(3, 16, strategy=strategy, stragglers={"minUpdates": 2, "maxStaleness": 20})
    job.start_aggregator()
    clients = [
        job.start_client(script, index, PAUSE=pause, HOLD="15") for index, pause in enumerate(["0.1", "0.2", "0.6"])
    ]
    chance = random.Random(1)  # noqa: S311
    for number in range(3, 14, 3):
        job.wait_for_round(number + chance.randrange(2))
        job.kill_aggregator()
        job.start_aggregator()
    job.let_go()
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0, 0], [job.log(f"client-{i}-0") for i in range(3)]
    counted = sum(record["updates"] for record in records(job))
    done = sum((trained(job, index) for index in range(3)), Counter[int]()).total()
    logs = [job.log(f"client-{index}-0") for index in range(3)]
    # Each training counts at most once; only training in progress at the end of the last round does not count.
    refused = sum(len(rounds(log, "not used") - rounds(log, "accepted")) for log in logs)
    assert done - min(refused, 6) <= counted <= done, "\n".join(logs)
    assert len(records(job)) == 16


def test_over_selection_ends_a_round_with_the_fastest(federation: Make, script: Path) -> None:
    job = federation(4, 10_000, selection={"policy": "Random", "fraction": "0.5", "overSelect": "1", "minClients": 2})
    job.start_aggregator()
    for index in range(2):
        job.start_client(script, index, PAUSE="0.1")
    job.wait_for_round(1)
    for index in (2, 3):
        job.start_client(script, index, PAUSE="600")
        eventually("it is in a round", (job.directory / f"trained-{index}").exists)
    job.wait_for_round(job.status().completed_rounds + 3)
    assert records(job)[-1]["selected"] == 4
    assert records(job)[-1]["updates"] == 2


def test_an_evaluator_measures_and_does_not_train(federation: Make, script: Path) -> None:
    pools = [{"name": POOL, "replicas": 2, "cloud": {}},
             {"name": "judge", "replicas": 1, "role": "Evaluate", "cloud": {}}]  # fmt: skip
    job = federation(2, 4, pools=pools)
    job.start_aggregator()
    credentials = job.credentials(pool="judge")
    judge = job.start_client(
        script,
        2,
        credentials=credentials,
        ISTHMUS_POOL="judge",
        ISTHMUS_INDEX="0",
        ISTHMUS_POOL_SIZE="1",
    )
    eventually("the judge is there", lambda: job.status().pools[1].connected == 1)
    clients = [job.start_client(script, index, PAUSE="0.1") for index in range(2)]
    status = job.wait_for_completion()
    assert [client.wait() for client in (judge, *clients)] == [0, 0, 0]
    assert not (job.directory / "trained-2").exists()
    assert updates(job) == dict.fromkeys(range(1, 5), 2)
    # Each client reports its number, with a weight of that number plus one.
    score = next(metric for metric in status.metrics if metric.name == "score")
    assert (score.round, score.value) == (4, pytest.approx((0 * 1 + 1 * 2 + 2 * 3) / 6))
