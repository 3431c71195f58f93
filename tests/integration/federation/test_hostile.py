"""A client with a valid certificate that violates the protocol neither stops nor controls the job."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
import torch
from safetensors.torch import load_file

from isthmus.tensors import checksum_of, chunks_of
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.process import log_limit

from .conftest import POOL, Federation, eventually
from .test_protocol import HandMadeClient

Make = Callable[..., Federation]
SMALL = {"w": torch.zeros(1000)}
ESCAPES = "acc\n2026-11-29 13:00:00,000 INFO round 9 committed: forged\x1b[2J\x1b]0;owned\x07[/bold]\u202e"


class Clients:
    """Clients without the library, which end with the test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def __call__(self, job: Federation, index: int = 0, **options: object) -> HandMadeClient:
        client = HandMadeClient(job, index, state=SMALL, **options)  # type: ignore[arg-type]
        return self._stack.enter_context(closing(client))


@pytest.fixture
def clients() -> Iterator[Clients]:
    with ExitStack() as stack:
        yield Clients(stack)


def started(
    make: Make, clients: Clients, count: int, rounds: int, **spec: object
) -> tuple[Federation, list[HandMadeClient], str]:
    """Return a job whose first round is in progress, its clients, and the digest of its first model."""
    job = make(count, rounds, **spec)
    job.start_aggregator()
    made = [clients(job, index) for index in range(count)]
    made[0].offer()
    assert made[0].push(made[0].header(0)).verdict == pb.PushReply.ACCEPTED
    return job, made, made[0].offer(1).base_digest


def values(of: float) -> list[bytes]:
    return [bytes(chunk) for chunk in chunks_of({"w": torch.full((1000,), of)})]


def model_of(job: Federation, number: int) -> torch.Tensor:
    return load_file(job.state / "checkpoints" / f"round-{number:06d}.safetensors")["w"]


def hand_in(members: list[HandMadeClient], number: int, digest: str) -> None:
    for client in members:
        assert client.push(client.header(number, digest)).verdict == pb.PushReply.ACCEPTED


def complete(job: Federation, *members: HandMadeClient) -> None:
    eventually("training is complete", lambda: job.status().phase == pb.FederationStatus.COMPLETE)
    for client in members:
        client.close()
    job.wait_for_exit()


def test_names_that_no_checkpoint_could_hold(federation: Make, clients: Clients) -> None:
    """A name of 20 MiB in the round's record would exceed the checkpoint reader's limit on headers."""
    job, (good, evil), digest = started(federation, clients, 2, 2)
    for metrics in ({"\x01" * (20 << 20): 1.0}, {str(number): 1.0 for number in range(100_000)}, {ESCAPES: 1.0}):
        reply = evil.push(evil.header(1, digest, metrics=metrics))
        assert (reply.verdict, reply.reason) == (pb.PushReply.INVALID, "bounds")
        assert len(reply.message) <= 300 and reply.message.isprintable()
    reply = evil.push(evil.header(1, digest, buffers=["x" * (20 << 20)]))
    assert (reply.verdict, reply.reason) == (pb.PushReply.INVALID, "bounds")
    evaluation = pb.Evaluation(model_digest=digest, num_examples=1, metrics={ESCAPES: 1.0})
    evil.say(pb.ClientMessage(evaluation=evaluation))
    hand_in([good, evil], 1, digest)
    eventually("the round is committed", lambda: job.status().completed_rounds == 1)
    job.kill_aggregator()
    job.start_aggregator()  # every committed round can be read
    good, evil = clients(job, 0), clients(job, 1)
    digest = good.offer(2).base_digest
    hand_in([good, evil], 2, digest)
    complete(job, good, evil)


def test_what_clients_say_cannot_forge_lines(federation: Make, clients: Clients) -> None:
    job, (_, evil), digest = started(federation, clients, 2, 1)
    evil.say(pb.ClientMessage(leaving=pb.Leaving(reason=ESCAPES + "L" * (20 << 20))))
    evil.say(pb.ClientMessage(heartbeat=pb.Heartbeat(stage=ESCAPES)))
    stranger = evil.header(1, digest)
    stranger.tensors[0].name = ESCAPES + "T" * (10 << 20)
    assert evil.push(stranger).verdict == pb.PushReply.INVALID
    assert evil.push(evil.header(1, digest, codecs=[ESCAPES])).verdict == pb.PushReply.INVALID
    evil.say(pb.ClientMessage(failure=pb.Failure(message=ESCAPES + "F" * (20 << 20), traceback=ESCAPES)))
    status = job.wait_for(lambda status: any(pool.failures for pool in status.pools))
    assert status.ByteSize() < 10_000
    failure = status.pools[0].failures[0]
    assert failure.message.isprintable() and "\x1b" not in failure.traceback
    log = job.log("aggregator")
    assert len(log) < 20_000
    assert all(line.isprintable() for line in log.splitlines())
    assert not any(line.startswith("2026-11-29 13:00:00,000") for line in log.splitlines())


def test_a_flood_of_what_is_refused_does_not_fill_the_log(federation: Make, clients: Clients) -> None:
    job, (_, evil), _ = started(federation, clients, 2, 1)
    count = 4 * log_limit.BURST
    answers = (message for message in evil.messages if message.HasField("reply"))
    for _ in range(count // 20):  # a client that does not read its messages is disconnected
        for _ in range(20):
            evil.say(pb.ClientMessage(update=b"\xff" * 100))
        assert sum(1 for _ in zip(range(20), answers, strict=False)) == 20
    lines = job.log("aggregator").splitlines()
    assert log_limit.BURST <= sum("update refused" in line for line in lines) < 2 * log_limit.BURST


def test_a_pool_that_evaluates_does_not_train(federation: Make, clients: Clients) -> None:
    pools = [
        {"name": POOL, "replicas": 1, "cloud": {}},
        {"name": "judge", "replicas": 1, "role": "Evaluate", "cloud": {}},
    ]
    job = federation(1, 1, pools=pools)
    job.start_aggregator()
    good = clients(job)
    good.offer()
    assert good.push(good.header(0)).verdict == pb.PushReply.ACCEPTED
    digest = good.offer(1).base_digest
    judge = clients(job, pool="judge", evaluates=True, round=1, base_digest=digest)
    assert judge.offer().kind == pb.Offer.EVALUATE
    reply = judge.push(judge.header(1, digest), values(7.0))
    assert (reply.verdict, reply.reason) == (pb.PushReply.STALE, "not_selected")
    assert job.status().selected == 1
    hand_in([good], 1, digest)
    eventually("the round is committed", lambda: job.status().completed_rounds == 1)
    assert torch.equal(model_of(job, 1), SMALL["w"])


def test_no_client_selects_itself(federation: Make, clients: Clients) -> None:
    """A client cannot claim, in its hello, to be training a round that it was not offered."""
    selection = {"policy": "Random", "fraction": "0.5", "minClients": 2}
    job = federation(4, 1, selection=selection)
    job.start_aggregator()
    made = [clients(job, index) for index in range(2)]
    made[0].offer()
    assert made[0].push(made[0].header(0)).verdict == pb.PushReply.ACCEPTED
    digest = made[0].offer(1).base_digest
    late = clients(job, 2, round=1, base_digest=digest)
    next(message for message in late.messages if message.HasField("committed"))
    reply = late.push(late.header(1, digest), values(7.0))
    assert (reply.verdict, reply.reason) == (pb.PushReply.STALE, "not_selected")
    assert job.status().selected == 2


@pytest.mark.parametrize("algorithm", ["FedAvg", "FedAsync"])
def test_late_updates_for_rounds_that_were_never_offered(federation: Make, clients: Clients, algorithm: str) -> None:
    # The clients of an HPC pool share a certificate.
    site = {"name": POOL, "replicas": 2, "hpc": {"siteRef": {"name": "site"}, "environment": "any"}}
    spec: dict[str, object] = {"strategy": {"algorithm": algorithm}, "pools": [site]}
    if algorithm == "FedAvg":
        spec["stragglers"] = {"late": "Fold"}
    job, made, digest = started(federation, clients, 2, 3, **spec)
    hand_in(made if algorithm == "FedAvg" else made[:1], 1, digest)
    eventually("the round is committed", lambda: job.status().completed_rounds == 1)
    for index in range(1000, 1010):
        ghost = made[1].header(1, digest)
        ghost.index = index
        assert made[1].push(ghost, values(1e6)).reason == "not_selected"
    assert torch.equal(model_of(job, 1), SMALL["w"])
    before = job.status()
    forged = made[0].header(1, digest)
    forged.index = 1
    assert made[0].push(forged, values(1e6)).verdict == pb.PushReply.FENCED
    assert (job.status().submitted, job.status().completed_rounds) == (before.submitted, before.completed_rounds)


def test_no_client_submits_for_a_connected_one(federation: Make, clients: Clients) -> None:
    job, (first, second), digest = started(federation, clients, 2, 1)
    forged = second.header(1, digest)
    forged.instance = "another process"
    assert second.push(forged, values(5.0)).verdict == pb.PushReply.FENCED
    # An impossible attempt is refused; one that has left does not fence others.
    unissued = clients(job, 1, attempt=2**32 - 1)
    stop = next(unissued.messages).stop
    assert stop.reason == pb.Stop.REFUSED and "cannot be one that a scheduler has started" in stop.message
    false = clients(job, 1, attempt=77_777)
    false.offer(1)
    false.close()
    eventually("it is gone", lambda: job.status().pools[0].connected == 1)
    again = clients(job, 1, attempt=1)
    assert again.offer(1).kind == pb.Offer.TRAIN
    hand_in([first, again], 1, digest)
    complete(job, first, second, again)
    assert torch.equal(load_file(job.state / "model.safetensors")["w"], SMALL["w"])


def test_initial_weights_are_asked_of_the_next_one(federation: Make, clients: Clients) -> None:
    """The next client is asked for initial weights after a refusal, and after silence."""
    job = federation(3, 1, stragglers={"roundDeadlineSeconds": 2})
    job.start_aggregator()
    made = [clients(job, index) for index in range(3)]
    made[0].offer()
    nothing = torch.full((1000,), float("nan"))
    bad = made[0].push(made[0].header(0), values(float("nan")), checksum_of({"w": nothing}))
    assert (bad.verdict, bad.reason) == (pb.PushReply.INVALID, "non_finite")
    for shape in ([2**64 - 1, 0], [2**40, 2**24, 0]):
        header = made[0].header(0)
        header.tensors[0].shape[:], header.tensors[0].size = shape, 0
        assert made[0].push(header, [b""]).reason == "shape"
    assert made[1].offer().kind == pb.Offer.INITIALIZE  # and does not reply
    assert made[2].offer().kind == pb.Offer.INITIALIZE
    assert made[2].push(made[2].header(0)).verdict == pb.PushReply.ACCEPTED
    assert made[2].offer(1).kind == pb.Offer.TRAIN


def test_the_state_is_the_jobs_own(federation: Make, clients: Clients) -> None:
    job, made, digest = started(federation, clients, 1, 1)
    hand_in(made, 1, digest)
    complete(job, *made)
    files = [path for path in job.state.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"rounds.jsonl", "model.pt", "model.safetensors"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in job.state.rglob("*") if path.is_dir()} == {0o700}
    assert job.state.stat().st_mode & 0o777 == 0o700
