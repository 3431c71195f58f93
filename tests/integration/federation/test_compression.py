"""Compressed federations: almost the same model for a fraction of the bytes, and no loss after crashes."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import torch
import xxhash
from safetensors.torch import load_file

from isthmus.codecs import encode, parse_chain, upload_seed
from isthmus.codecs.zstd import compressed
from isthmus_contracts.pb import federation_pb2 as pb

from . import linear_model
from .conftest import POOL, Federation
from .test_protocol import STATE, HandMadeClient

Make = Callable[..., Federation]

NORMALISED = Path(__file__).with_name("normalised.py")
WIDTH = "320"
"""Environment that gives the model 109,000 parameters."""
KEEP = {"checkpoint": {"keep": 100}}
SLOW = {"config": {"rate": "0.02"}, "image": "unused", "command": ["python"]}


def checkpoint(job: Federation, number: int) -> dict[str, torch.Tensor]:
    return load_file(job.state / "checkpoints" / f"round-{number:06d}.safetensors")


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[name].double().reshape(-1) for name in sorted(state)])


def bytes_by_codec(job: Federation, direction: str) -> dict[str, float]:
    found = re.findall(rf'isthmus_{direction}_bytes_total{{codec="([^"]+)",[^}}]*}} (\S+)', job.metrics())
    return {codec: float(value) for codec, value in found}


def updates(job: Federation) -> dict[int, int]:
    lines = (job.state / "rounds.jsonl").read_text().splitlines()
    return {record["round"]: record["updates"] for record in map(json.loads, lines)}


def trained(job: Federation, client: int) -> Counter[int]:
    return Counter(int(line) for line in (job.directory / f"trained-{client}").read_text().split())


def beginnings(job: Federation, client: int) -> dict[int, str]:
    lines = (job.directory / f"began-{client}").read_text().splitlines()
    return {int(number): value for number, value in (line.split() for line in lines)}


def test_int8_uploads_train_nearly_the_same_model_for_a_quarter_of_the_bytes(federation: Make, script: Path) -> None:
    finals = {}
    for upload in ("None", "Int8"):
        job = federation(2, 5, compression={"upload": upload}, aggregator=KEEP, task=SLOW)
        job.start_aggregator()
        clients = [job.start_client(script, index, WIDTH=WIDTH, HOLD="5") for index in range(2)]
        job.wait_for_round(3)  # after completion has been observed there are no metrics to read
        received = bytes_by_codec(job, "received")
        job.let_go()
        job.wait_for_completion()
        assert [client.wait() for client in clients] == [0, 0], job.log("client-0-0")
        finals[upload] = flat(checkpoint(job, 5))
        start = flat(checkpoint(job, 0))
        assert updates(job) == dict.fromkeys(range(1, 6), 2)
    # The initial weights are sent raw: one model's size. Up to ten updates followed.
    assert received["Delta+Int8"] <= 0.3 * 10 * received["None"]
    assert received["None"] > 400_000
    error = (finals["Int8"] - finals["None"]).norm() / (finals["None"] - start).norm()
    assert 0 < error < 0.05


def test_every_client_sees_the_model_that_is_checkpointed(federation: Make, script: Path) -> None:
    job = federation(2, 6, compression={"upload": "Int8", "download": "Rotation+Int8"}, aggregator=KEEP, task=SLOW)
    job.start_aggregator()
    clients = [job.start_client(script, index, WIDTH=WIDTH, PAUSE="0.2", HOLD="5") for index in range(2)]
    job.wait_for_round(3)
    sent = bytes_by_codec(job, "sent")
    # The initial model is sent raw to both; later ones are differences from the previous model.
    assert sent["Delta+Rotation+Int8"] > 0
    job.kill_aggregator()
    job.start_aggregator()
    job.let_go()
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0], job.log("client-0-0")
    seen = [beginnings(job, client) for client in range(2)]
    assert seen[0] == seen[1]
    assert seen[0] == {number: linear_model.digest(checkpoint(job, number - 1)) for number in range(1, 7)}
    assert [trained(job, client) for client in range(2)] == [Counter(range(1, 7))] * 2


def test_kills_with_error_feedback_train_nothing_twice(federation: Make, script: Path) -> None:
    job = federation(2, 8, compression={"upload": "TopK+Int8+Zstd", "topKFraction": "0.05"}, aggregator=KEEP, task=SLOW)
    scratch = job.directory / "scratch"
    job.start_aggregator()
    survivor, victim = (
        job.start_client(script, index, WIDTH=WIDTH, PAUSE="0.2", HOLD="7", ISTHMUS_SCRATCH=str(scratch))
        for index in range(2)
    )
    for number in (2, 4):
        job.wait_for_round(number)
        job.kill_aggregator()
        job.start_aggregator()
    job.wait_for_round(5)
    victim.kill()
    victim.wait()
    job.let_go()
    replacement = job.start_client(script, 1, attempt=1, WIDTH=WIDTH, ISTHMUS_SCRATCH=str(scratch))
    job.wait_for_completion()
    assert [survivor.wait(), replacement.wait()] == [0, 0], job.log("client-0-0")
    assert updates(job) == dict.fromkeys(range(1, 9), 2)
    assert trained(job, 0) == Counter(range(1, 9))
    assert re.search(r"loaded residual of round [4-6] from", job.log("client-1-1"))
    assert sorted(path.name for path in scratch.iterdir()) == [
        "residual-pool-0.safetensors", "residual-pool-1.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("upload", ["Int8", "TopK+Int8", "TopK+Int4+Zstd"])
def test_an_update_of_nan_travels_and_is_refused_as_such(federation: Make, script: Path, upload: str) -> None:
    job = federation(2, 3, compression={"upload": upload}, stragglers={"minUpdates": 1}, task=SLOW)
    job.start_aggregator()
    clients = [job.start_client(script, k, WIDTH=WIDTH, HOLD="3", NAN="2" if k == 0 else "0") for k in range(2)]
    job.wait_for_round(2)
    refused = re.findall(r'isthmus_updates_refused_total\{.*reason="(\w+)"\} (\S+)', job.metrics())
    assert {reason: float(count) for reason, count in refused} == {"non_finite": 1.0}
    job.let_go()
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0], job.log("client-0-0")
    assert updates(job) == {1: 2, 2: 1, 3: 2}
    assert "round 2: update refused: 4.weight holds NaN or infinity" in job.log("client-0-0")


def test_what_no_encoder_makes_is_refused_for_good(federation: Make) -> None:
    job = federation(2, 2, compression={"upload": "Int8+Zstd"})
    job.start_aggregator()
    first, second = HandMadeClient(job, 0), HandMadeClient(job, 1)
    try:
        assert first.offer().kind == pb.Offer.INITIALIZE
        assert first.push(first.header(0)).verdict == pb.PushReply.ACCEPTED
        offer = first.offer()
        assert list(offer.codecs) == ["Delta", "Int8", "Zstd"]
        chain = parse_chain(offer.codecs)
        good = encode(STATE, chain, upload_seed(1, POOL, 0), STATE)
        good_header = first.header(1, offer.base_digest, codecs=offer.codecs)
        del good_header.tensors[:]
        good_header.tensors.extend(good.specs)

        def refused(data: bytes, header: pb.UpdateHeader = good_header) -> str:
            reply = first.push(header, [data], xxhash.xxh3_128_hexdigest(data))
            assert reply.verdict == pb.PushReply.INVALID
            return reply.message

        plain = encode(STATE, parse_chain(["Delta", "Int8"]), "", STATE)
        bad_scale = b"".join(compressed([torch.tensor([float("nan")]).numpy().tobytes() + plain.chunks[0][4:]]))
        assert refused(bad_scale) == "w holds NaN or infinity (in a block's scale)"
        assert refused(b"\xff" * 100) == "a Zstd block of 4294967295 bytes"
        assert refused(b"", first.header(1, offer.base_digest, codecs=["Delta", "Int4"])) == (
            "the job's uploads are Delta+Int8+Zstd, not Delta+Int4"
        )
        # A truncated stream may be an accident: it is resent, and then accepted.
        with pytest.raises(grpc.RpcError) as error:
            first.push(good_header, good.chunks[:-1] or [b""], None)
        assert error.value.code() == grpc.StatusCode.DATA_LOSS
        assert first.push(good_header, good.chunks, good.checksum).verdict == pb.PushReply.ACCEPTED
        assert 'result="invalid"} 3.0' in job.metrics()
    finally:
        for client in (first, second):
            client.close()


@pytest.mark.parametrize(
    "compression", [{"upload": "TopK"}, {"upload": "TopK+Int8", "download": "Int8"}, {"upload": "Rotation+Int8"}]
)
def test_statistics_travel_as_they_are(federation: Make, compression: dict[str, str]) -> None:
    job = federation(2, 4, compression=compression, aggregator=KEEP)
    job.start_aggregator()
    clients = [job.start(f"client-{k}", [NORMALISED], job.client_environment(k)) for k in range(2)]
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0], job.log("client-0")
    for number in range(1, 5):
        sent = [torch.load(job.directory / f"sent-{client}-{number}.pt", weights_only=True) for client in range(2)]
        model = checkpoint(job, number)
        for name in ("0.running_mean", "0.running_var"):
            # Both clients have equal numbers of examples. A codec's error would be about one per cent of the largest.
            torch.testing.assert_close(model[name], (sent[0][name] + sent[1][name]) / 2, rtol=1e-5, atol=1e-7)
        assert (model["0.running_var"] > 0).all()
