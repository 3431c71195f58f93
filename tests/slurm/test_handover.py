"""The next array continues when the time limit ends the first: they overlap, and no client counts twice in a round."""

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from isthmus_contracts.identities import slurm_job_name
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_operator.effects.bridge import pool_view
from isthmus_operator.planning import hpc_pool

from .aggregator import SCRIPT, UID, Aggregator
from .slurm_site import Site, ensure, get, over, running, slurm, spec, tail, until

if TYPE_CHECKING:
    from lab import Lab

# A round takes a second, and the operator queues the next attempt after sixty.
ROUNDS = 80
LIMIT = 120


@pytest.fixture
def aggregator(lab: "Lab", tmp_path: Path) -> Iterator[Aggregator]:
    with Aggregator(tmp_path, lab.node_address, ROUNDS) as one:
        yield one


def time_to_queue_again(pool: pb.Pool, aggregator: Aggregator) -> bool:
    """Return the operator's decision to queue the next attempt, based on the bridge's report."""
    hpc = SimpleNamespace(time_limit_seconds=LIMIT)
    context: Any = SimpleNamespace(
        observed=SimpleNamespace(federation=SimpleNamespace(total_rounds=ROUNDS, completed_rounds=aggregator.rounds())),
        reached=lambda moment: dt.datetime.now(dt.UTC) >= moment,
    )
    record: Any = SimpleNamespace(cancelling=False, given_up=None)
    return hpc_pool._ends_soon(context, SimpleNamespace(hpc=hpc), record, pool_view(pool, 1))  # type: ignore[arg-type]


def trained(site: Site, key: str, client: int) -> set[int]:
    """Return the rounds that this array's client began."""
    file = site.folder / "run" / key / "work" / str(client) / f"trained-{client}"
    return {int(line) for line in file.read_text().split()} if file.exists() else set()


def with_running_task(*keys: str) -> set[str]:
    """Return the keys with a running task, from one squeue call."""
    named = {slurm_job_name(key): key for key in keys}
    listed = slurm("squeue", "-h", "-r", f"--name={','.join(named)}", "--states=RUNNING", "-O", "Name:128").split()
    return {named[name] for name in listed}


def test_the_next_array_carries_on_before_the_time_limit_ends_the_first(
    site: Site, aggregator: Aggregator, lab: "Lab"
) -> None:
    site.settings["slurm"]["warning_seconds"] = 5
    operator = site.start()
    first, second = site.key(), site.key()
    wanted = spec(
        job_uid=UID, replicas=2, first_client=0, total_clients=2, time_limit_seconds=LIMIT, memory_mib=500,
        command=[str(lab.user_python()), str(SCRIPT)], env={"PAUSE": "1"},
    )  # fmt: skip
    wanted.federation.CopyFrom(aggregator.federation())
    ensure(operator, first, wanted)
    running(operator, first)
    pool = get(operator, first)
    assert pool.ends_at - pool.submitted_at > 0 and not time_to_queue_again(pool, aggregator)
    until(aggregator.rounds, "the first array trains")
    until(lambda: time_to_queue_again(get(operator, first), aggregator), "the operator would queue the next attempt")

    wanted.attempt, wanted.time_limit_seconds = 2, 600
    ensure(operator, second, wanted)
    until(lambda: with_running_task(first, second) == {first, second}, "both arrays run")
    before = aggregator.rounds()
    assert 0 < before < ROUNDS
    ended = over(operator, first)
    logs = [tail(operator, key, index) for key in (first, second) for index in range(2)]
    # Warned and ended by its time limit, or fenced by the newer attempt, but never cancelled.
    assert ended.phase in (pb.Pool.SUCCEEDED, pb.Pool.FAILED), (ended, logs)
    site.vanish(first)
    done = over(operator, second, 400)
    assert done.phase == pb.Pool.SUCCEEDED, (done, logs, aggregator.log())

    records = aggregator.records()
    assert [record["round"] for record in records] == list(range(1, ROUNDS + 1))
    for record in records:
        assert record["updates"] <= record["selected"] <= 2, record
        assert record["pools"] == {"hpc": record["updates"]}, record
    for client in range(2):
        old, new = trained(site, first, client), trained(site, second, client)
        assert old | new == set(range(1, ROUNDS + 1)), "nobody missed a round"
        # At most one round: the one in progress when the newer attempt connected.
        assert len(old & new) <= 1 and max(old) <= min(new) and max(new) == ROUNDS, (old, new)
