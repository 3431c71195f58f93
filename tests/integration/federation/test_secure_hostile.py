"""A client that breaks the protocol of secure aggregation is dropped with a reason, and the round ends without it."""

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from isthmus.tensors import State
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa

from .conftest import Federation
from .secure_by_hand import SecureClient
from .secure_parties import Parties
from .test_faults import records

Make = Callable[..., Federation]
HONEST = 4
SECURE = {"secureAggregation": {"metrics": {"score": "100"}, "phaseDeadlineSeconds": 5}}
Step = sa.SecureClientMessage


def short_key(message: Step) -> None:
    message.advertise.entry.mask_key = b"k" * 31


def low_order_key(message: Step) -> None:
    message.advertise.entry.share_key = bytes(32)


def wrong_signature(message: Step) -> None:
    message.advertise.entry.signature = bytes(64)


def other_client(message: Step) -> None:
    message.advertise.entry.index = 0


def other_job(message: Step) -> None:
    message.advertise.entry.credential.job_uid = "other"


def short_shares(message: Step) -> None:
    message.shares.sealed[0].ciphertext = b"short"


def few_shares(message: Step) -> None:
    del message.shares.sealed[1:]


def shares_for_strangers(message: Step) -> None:
    message.shares.sealed[0].peer = 999


def large(message: Step) -> None:
    message.shares.sealed[0].ciphertext = bytes(1 << 20)


def wrong_consent(message: Step) -> None:
    message.consent.signature = bytes(64)


def short_answer(message: Step) -> None:
    del message.unmask.shares[:]


def wrong_answer(message: Step) -> None:
    for share in message.unmask.shares:
        share.self_seed_share = bytes(66)


# By round: the step that is spoilt, how, and the reason that is counted.
FAULTS: list[tuple[str, Callable[[Step], None], str]] = [
    ("advertise", short_key, "key"), ("advertise", low_order_key, "key"), ("advertise", wrong_signature, "signature"),
    ("advertise", other_client, "entry"), ("advertise", other_job, "credential"), ("shares", short_shares, "shares"),
    ("shares", few_shares, "shares"), ("shares", shares_for_strangers, "shares"), ("shares", large, "size"),
    ("consent", wrong_consent, "signature"), ("unmask", short_answer, "shares"), ("unmask", wrong_answer, "shares"),
]  # fmt: skip
SILENT = ("advertise", "shares", "consent", "unmask")


def clear_metric(header: pb.UpdateHeader, tensors: State) -> State:
    header.metrics["loss"] = 1.0
    return tensors


def clear_examples(header: pb.UpdateHeader, tensors: State) -> State:
    header.num_examples = 7
    return tensors


def unmasked(header: pb.UpdateHeader, tensors: State) -> State:
    header.secure_incarnation = 0
    return tensors


def replaced_instance(header: pb.UpdateHeader, tensors: State) -> State:
    header.secure_incarnation -= 1
    return tensors


def floats(header: pb.UpdateHeader, tensors: State) -> State:
    header.tensors[0].dtype = "F32"
    return {name: tensor.view(torch.float32) if number == 0 else tensor
            for number, (name, tensor) in enumerate(tensors.items())}  # fmt: skip


def missing(header: pb.UpdateHeader, tensors: State) -> State:
    del header.tensors[-1]
    return dict(list(tensors.items())[:-1])


# By round after the others: how the update is spoilt, and the reply.
UPDATES: list[tuple[Callable[[pb.UpdateHeader, State], State], str]] = [
    (clear_metric, "clear"), (clear_examples, "clear"), (unmasked, "clear"), (replaced_instance, "incarnation"),
    (floats, "dtype"), (missing, "missing_tensor"),
]  # fmt: skip


def test_what_is_malformed_is_refused_and_the_round_ends(federation: Make, script: Path) -> None:
    """Four honest clients, and one that is hostile in another way in each round."""
    rounds, parties = len(FAULTS) + len(UPDATES), Parties()
    job = federation(HONEST + 1, rounds, privacy=SECURE, stragglers={"minUpdates": HONEST})
    job.start_aggregator()

    def spoil(number: int, message: Step) -> Step:
        step, change, _ = FAULTS[number - 1] if number <= len(FAULTS) else ("", None, "")
        if message.WhichOneof("step") == step and change is not None:
            change(message)
        return message

    def spoil_update(number: int, header: pb.UpdateHeader, tensors: State) -> State:
        number -= len(FAULTS) + 1
        return UPDATES[number][0](header, tensors) if 0 <= number < len(UPDATES) else tensors

    clients = [parties.start_client(job, script, index) for index in range(HONEST)]
    with closing(SecureClient(job, parties, HONEST, spoil, spoil_update)) as evil:
        job.wait_for(lambda status: status.completed_rounds >= rounds - 1)
        metrics = job.metrics()
        job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * HONEST, job.log("client-0-0")
    before = {"advertise", "shares"}
    expected = [HONEST + (step not in before) for step, _, _ in FAULTS]
    expected += [HONEST + (reason == "incarnation") for _, reason in UPDATES]
    assert [record["updates"] for record in records(job)] == expected
    counted = dict(re.findall(r'isthmus_secure_faults_total\{.*reason="(\w+)"\} (\d+)', metrics))
    # A wrong share is found out if it is among those from which the secrets are recovered, which are the first ones.
    unseen = len(FAULTS) - job.log("aggregator").count("is dropped from secure aggregation")
    assert unseen in (0, 1)
    for reason in {reason for _, _, reason in FAULTS}:
        expected_count = sum(reason == other for _, _, other in FAULTS) - (unseen if reason == "shares" else 0)
        assert int(counted[reason]) == expected_count, (reason, counted)
    for number, (_, reason) in enumerate(UPDATES, start=len(FAULTS) + 1):
        assert [reply.reason for reply in evil.replies[number] if reply.reason] == [reason], number
    assert "is done again" not in job.log("aggregator")


def test_a_silent_client_delays_a_phase_by_its_deadline_only(federation: Make, script: Path) -> None:
    parties = Parties()
    job = federation(HONEST + 1, len(SILENT), privacy=SECURE, stragglers={"minUpdates": HONEST})
    job.start_aggregator()

    def spoil(number: int, message: Step) -> Step | None:
        return None if message.WhichOneof("step") == SILENT[number - 1] else message

    clients = [parties.start_client(job, script, index) for index in range(HONEST)]
    with closing(SecureClient(job, parties, HONEST, spoil, lambda number, header, tensors: tensors)):
        job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * HONEST, job.log("client-0-0")
    assert [record["updates"] for record in records(job)] == [HONEST, HONEST, HONEST + 1, HONEST + 1]
    log = job.log("aggregator")
    for phase in SILENT[:3]:  # four of five sets of shares are enough, so the last phase does not wait
        assert f"pool/{HONEST} is left out of secure aggregation: no answer in the phase {phase} in time" in log


def test_nothing_is_opened_for_fewer_clients_than_the_manifest_demands(federation: Make, script: Path) -> None:
    """The status says what is missing; the round ends once a client has come back."""
    parties = Parties()
    job = federation(3, 2, privacy={"secureAggregation": {"metrics": {"score": "100"}, "phaseDeadlineSeconds": 5}})
    job.start_aggregator()
    clients = [parties.start_client(job, script, index, HOLD="2") for index in range(3)]
    job.wait_for_round(1)
    clients[2].kill()
    clients[2].wait()
    job.let_go()
    status = job.wait_for(lambda status: "needed updates" in status.message)
    # Without the keys of the third client the others have no masks; with them, two updates are there.
    assert re.search(r"round 2 has [02] of 3 needed updates; waiting for clients", status.message)
    assert status.completed_rounds == 1
    clients[2] = parties.start_client(job, script, 2, attempt=1)
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * 3, job.log("client-2-1")
    assert [record["updates"] for record in records(job)] == [3, 3]
