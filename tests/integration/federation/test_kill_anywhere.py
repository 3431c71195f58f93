"""The aggregator is killed at every point between a chunk's arrival and the announcement of a commit."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from safetensors import safe_open

from isthmus_contracts import identities
from isthmus_contracts.dp_accounting import Spent
from tests.support.ports import free_port

from .conftest import DAY, POOL, SERVER_NAME, UID, Federation, eventually
from .nursery import Nursery
from .test_faults import records, trained, updates

Make = Callable[..., Federation]
CLIENTS = 2
SIGKILLED = -9
pytestmark = pytest.mark.timeout(1800)  # more than a hundred processes, one after the other


def run(
    job: Federation, script: Path, nurseries: tuple[Nursery, Nursery], kills: Iterable[int | str], *,
    clients: int = CLIENTS, prepare: Callable[[Path], None] | None = None, **environment: str,
) -> list[str]:  # fmt: skip
    """Run a job to its end; return the points at which its aggregators were killed.

    ``prepare`` is called with the directory of each client's certificate.
    """
    aggregators, trainers = nurseries
    port = free_port()
    description = {"name": "job", "namespace": "default", "uid": UID, "spec": job.spec}
    (job.directory / "job.json").write_text(json.dumps(description))
    job.authority.issue("aggregator", DAY, hosts=[SERVER_NAME]).write(job.directory / "server")
    for index in range(clients):
        job.credentials(index).write(job.directory / f"client-{index}")
        if prepare is not None:
            prepare(job.directory / f"client-{index}")
        env = {
            identities.ENV_ENDPOINT: f"127.0.0.1:{port}", identities.ENV_SERVER_NAME: SERVER_NAME,
            identities.ENV_TLS_DIR: f"client-{index}", identities.ENV_JOB_UID: UID, identities.ENV_POOL: POOL,
            identities.ENV_INDEX: str(index), identities.ENV_CLIENT: str(index), **environment,
        }  # fmt: skip
        trainers.start([script], job.directory, f"client-{index}-0.log", **env)
    argv = ["aggregator", "--job", "job.json", "--tls", "server", "--state", "state",
            "--listen", f"127.0.0.1:{port}", "--metrics", "127.0.0.1:0"]  # fmt: skip
    points = []
    for kill_at in kills:
        status = aggregators.start(argv, job.directory, "aggregator.log", kill_at)["status"]
        assert status == SIGKILLED, (status, kill_at, job.log("aggregator"))
        points.append((job.directory / "points").read_text().splitlines()[-1])
    assert aggregators.start(argv, job.directory, "aggregator.log", 0)["status"] == 0, job.log("aggregator")
    for index in range(clients):
        eventually(
            f"client {index} is done",
            lambda name=f"client-{index}-0": "training is complete" in job.log(name),  # type: ignore[misc]
        )
    return points


def verify(job: Federation, rounds: int, clients: int = CLIENTS) -> bytes:
    assert updates(job) == dict.fromkeys(range(1, rounds + 1), clients)
    for client in range(clients):
        # No round was trained twice, and no trained round is missing.
        assert trained(job, client) == Counter(range(1, rounds + 1))
    return (job.state / "model.safetensors").read_bytes()


def passed(job: Federation) -> list[str]:
    """Return the points that the last aggregator passed."""
    return (job.directory / "points").read_text().splitlines()


# The sweep misses some of these, since messages arrive in another order each time.
NAMED = (
    "RawDecoder.write", "Intake._count", "Intake._fold", "Deterministic.accept", "FedAvg.finish", "os.fsync",
    "Path.rename", "CheckpointStore.save", "CheckpointStore.append", "Client.send",
)  # fmt: skip


def test_at_every_point_of_a_round(federation: Make, script: Path, nurseries: tuple[Nursery, Nursery]) -> None:
    """Each aggregator is killed one point later than the previous one, and then each at a point of a given name."""
    rounds, first, last = 40, 5, 100
    undisturbed, killed = (federation(CLIENTS, rounds, strategy={"deterministic": True}) for _ in range(2))
    run(undisturbed, script, nurseries, [])
    named = [f"{side} {name}" for name in NAMED for side in ("before", "after")]
    points = run(killed, script, nurseries, [*range(first, last), *named])
    # The last aggregator completed a round and began another.
    begun = [number for number, point in enumerate(passed(undisturbed)) if point == "before Coordinator._begin_round"]
    assert begun[2] - begun[1] < last - first - 2 * CLIENTS
    assert points[-len(named) :] == named
    assert len(set(points)) > 25
    assert verify(killed, rounds) == verify(undisturbed, rounds)


def test_at_random_points_with_a_larger_model_and_codecs(
    federation: Make, script: Path, nurseries: tuple[Nursery, Nursery]
) -> None:
    """Several chunks, folding in threads, models in files, and codecs in both directions."""
    rounds, seed = 12, random.randrange(1 << 30)  # noqa: S311
    print(f"seed {seed}")
    spec = {"strategy": {"algorithm": "FedAvgM", "deterministic": True},
            "compression": {"upload": "Int8", "download": "Delta+Float16"},
            "task": {"image": "unused", "command": ["python"], "config": {"rate": "0.0001"}}}  # fmt: skip
    undisturbed, killed = (federation(CLIENTS, rounds, **spec) for _ in range(2))
    run(undisturbed, script, nurseries, [], WIDTH="600")
    assert any("Decoder.write" in point for point in passed(undisturbed))
    kills = random.Random(seed).choices(range(5, 130), k=12)  # noqa: S311
    run(killed, script, nurseries, kills, WIDTH="600")
    assert verify(killed, rounds) == verify(undisturbed, rounds)


def test_the_privacy_account_counts_what_was_published(
    federation: Make, script: Path, nurseries: tuple[Nursery, Nursery]
) -> None:
    """Each committed round is published once, wherever the aggregator is killed."""
    rounds = 24
    private = {"clipNorm": "0.5", "noiseMultiplier": "0.8"}
    job = federation(
        CLIENTS, rounds, privacy={"differentialPrivacy": private}, aggregator={"checkpoint": {"keep": 100}}
    )
    names = ("Private.accept", "Private.finish", "PrivacyBudget.account", "os.fsync", "Path.rename",
             "CheckpointStore.save", "PrivacyBudget.charge", "CheckpointStore.append", "Client.send")  # fmt: skip
    named = [f"{side} {name}" for name in names for side in ("before", "after")]
    assert run(job, script, nurseries, named, NORM="layer") == named
    verify(job, rounds)
    account = Spent()
    for record in records(job):
        account = account.after(0.8)
        assert (record["privacy"]["rounds"], record["round"]) == (account.rounds, account.rounds)
        assert record["privacy"]["epsilon"] == pytest.approx(account.epsilon(1e-5), rel=1e-9)
    # The record in each checkpoint equals the one in the file.
    for number, record in enumerate(records(job), start=1):
        with safe_open(job.state / "checkpoints" / f"round-{number:06d}.safetensors", "pt") as file:
            assert json.loads(file.metadata()["record"])["privacy"] == record["privacy"]


def test_the_model_that_met_the_target(federation: Make, script: Path, nurseries: tuple[Nursery, Nursery]) -> None:
    """Each aggregator is killed one point later between the first evaluation of that model and its delivery."""
    spec = {"objective": {"metric": "measured", "target": "1"}, "strategy": {"deterministic": True},
            "aggregator": {"checkpoint": {"keep": 1}}}  # fmt: skip
    undisturbed, killed = (federation(CLIENTS, 9, **spec) for _ in range(2))
    run(undisturbed, script, nurseries, [], COUNT="yes")
    named = [
        "before Evaluations.take", "after Evaluations.take", "before Coordinator._abandon",
        "before CheckpointStore.append", "after CheckpointStore.append", "before Delivery.deliver",
        "before CheckpointStore.write_final", "before Path.rename", "after CheckpointStore.write_final",
        "before CheckpointStore.write_best", "before Path.hardlink_to", "after CheckpointStore.write_best",
    ]  # fmt: skip
    assert run(killed, script, nurseries, named, COUNT="yes") == named
    for job in (undisturbed, killed):
        for name in ("model", "model-best"):
            with safe_open(job.state / f"{name}.safetensors", "pt") as file:
                assert file.metadata()["round"] == "1"
        assert [path.name for path in (job.state / "checkpoints").glob("round-*")] == ["round-000001.safetensors"]
        assert updates(job) == {1: CLIENTS}
        for client in range(CLIENTS):
            # The second round was begun, and no round was trained twice.
            assert trained(job, client) <= Counter((1, 2))
    model = "model-best.safetensors"
    assert (killed.state / model).read_bytes() == (undisturbed.state / model).read_bytes()
