"""A full disk at a round's commit delays the round, and has no other effect.

The kernel's limit on the size of a process's files simulates the disk: it truncates writes, in the
aggregator only, and can be lifted without privileges.
"""

import json
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors.torch import load_file

from isthmus_contracts.pb import federation_pb2 as pb

from .conftest import Federation, eventually
from .test_protocol import STATE, HandMadeClient
from .test_refusals import counted, finish, reason_of

Make = Callable[..., Federation]
SMALL = 100_000


def limit_files(job: Federation, size: int = resource.RLIM_INFINITY) -> None:
    """Limit the aggregator's file size, in bytes."""
    assert job.aggregator is not None
    _, hard = resource.prlimit(job.aggregator.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(
        job.aggregator.pid, resource.RLIMIT_FSIZE, (size if size != resource.RLIM_INFINITY else hard, hard)
    )


def checkpoints(job: Federation) -> list[str]:
    """Return the names of all checkpoints, each of which must be complete."""
    paths = sorted((job.state / "checkpoints").glob("*.safetensors"))
    for path in paths:
        assert load_file(path)["w"].shape == STATE["w"].shape
    return [path.name for path in paths]


def test_the_round_waits_for_room_and_then_goes_on(federation: Make) -> None:
    job = federation(2, 2, stragglers={"minUpdates": 1})
    job.start_aggregator()
    first, second = HandMadeClient(job, 0), HandMadeClient(job, 1)
    try:
        first.offer()
        assert first.push(first.header(0)).verdict == pb.PushReply.ACCEPTED
        digest = first.offer().base_digest
        # The round will not wait for the second client.
        assert reason_of(second, second.header(1, digest, codecs=["Zip"])) == "codec"
        limit_files(job, SMALL)
        assert first.push(first.header(1, digest)).verdict == pb.PushReply.ACCEPTED
        message = "the checkpoint cannot be written: File too large; trying again"
        status = job.wait_for(lambda status: status.message == message)
        assert (status.phase, status.current_round, status.completed_rounds) == (pb.FederationStatus.TRAINING, 1, 0)
        assert reason_of(second, second.header(1, digest)) == "closed"
        assert counted(job) == {"codec": 1, "closed": 1}
        assert 'isthmus_checkpoint_failures_total{job="job",namespace="default"}' in job.metrics()
        assert checkpoints(job) == ["round-000000.safetensors"]
        eventually("nothing half-written stays", lambda: not list(job.state.rglob("*.partial")))

        limit_files(job)
        status = job.wait_for(lambda status: status.completed_rounds == 1)
        assert status.message == ""
        assert checkpoints(job) == ["round-000000.safetensors", "round-000001.safetensors"]

        # The checkpoint of the last round fits, but not the final model, which is a little larger for plain PyTorch.
        size = (job.state / "checkpoints" / "round-000001.safetensors").stat().st_size
        limit_files(job, size + 256)  # records of rounds vary in length
        for client in (first, second):
            header = client.header(2, client.offer(2).base_digest)
            assert client.push(header).verdict == pb.PushReply.ACCEPTED
        status = job.wait_for(lambda status: status.message == message)
        assert status.completed_rounds == 2
        assert not (job.state / "model.pt").exists()
        limit_files(job)
        finish(job, first, second)
    finally:
        for client in (first, second):
            client.close()
    assert torch.load(job.state / "model.pt", weights_only=True)["w"].shape == STATE["w"].shape
    assert load_file(job.state / "model.safetensors")["w"].shape == STATE["w"].shape


def test_an_update_that_cannot_be_kept_is_sent_again(federation: Make) -> None:
    # The median stores the updates of a round on disk.
    job = federation(1, 1, strategy={"algorithm": "CoordinateMedian"})
    job.start_aggregator()
    client = HandMadeClient(job)
    try:
        client.offer()
        assert client.push(client.header(0)).verdict == pb.PushReply.ACCEPTED
        header = client.header(1, client.offer().base_digest)
        limit_files(job, SMALL)
        assert [reason_of(client, header) for _ in range(2)] == ["storage"] * 2
        assert job.status().message == "an update cannot be kept: File too large; trying again"
        limit_files(job)
        assert client.push(header).verdict == pb.PushReply.ACCEPTED
        finish(job, client)
    finally:
        client.close()


def test_a_round_does_not_end_without_an_update_that_cannot_be_kept(federation: Make) -> None:
    """An update that cannot be stored is not counted, even if the round could otherwise have ended."""
    state = {"w": torch.zeros(2_000_000)}
    size = state["w"].nbytes
    job = federation(4, 1, strategy={"algorithm": "CoordinateMedian"})
    job.start_aggregator()
    clients = [HandMadeClient(job, index, state=state) for index in range(4)]
    try:
        clients[0].offer()
        assert clients[0].push(clients[0].header(0)).verdict == pb.PushReply.ACCEPTED
        headers = [client.header(1, client.offer(1).base_digest) for client in clients]
        limit_files(job, size * 7 // 2)
        with ThreadPoolExecutor() as pool:
            pushes = [pool.submit(client.push, header) for client, header in zip(clients, headers, strict=True)]
        refused = [index for index, push in enumerate(pushes) if push.exception() is not None]
        assert len(refused) == 1
        assert (job.status().submitted, job.status().completed_rounds) == (3, 0)
        limit_files(job)
        assert clients[refused[0]].push(headers[refused[0]]).verdict == pb.PushReply.ACCEPTED
        finish(job, *clients)
    finally:
        for client in clients:
            client.close()
    assert json.loads((job.state / "rounds.jsonl").read_text())["updates"] == 4
