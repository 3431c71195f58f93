"""A site that demands noise of the clients is not content with an aggregator that asks for less."""

import pytest

from isthmus.secure_aggregation.client import ClientProtocol
from isthmus.secure_aggregation.refusal import Reason, Refusal
from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.wire.parties import Trust

from .secure_federation import JOB, begin_of, make_parties


def begin(noise: float, **fields: object) -> pb.SecureServerMessage:
    message = begin_of(1, **fields)
    if noise:
        message.layout.noise.kind = pb.SecureNoise.SKELLAM
        message.layout.noise.noise_multiplier, message.layout.noise.contributors = noise, 3
    return pb.SecureServerMessage(incarnation=1, begin=message)


def answer(demanded: float | None, message: pb.SecureServerMessage) -> list[pb.SecureClientMessage]:
    (party,) = make_parties("site")
    trust = Trust(roots={party.name: party.public}, noise_multiplier=demanded)
    return ClientProtocol(JOB, "site", 0, 0, "i", party.signer("site"), trust).receive(message)


@pytest.mark.parametrize(("demanded", "offered"), [(4.0, 0.0), (4.0, 3.9), (0.0, 0.0)])
def test_less_noise_is_refused(demanded: float, offered: float) -> None:
    with pytest.raises(
        Refusal, match=r"this site demands .*noise.* from the clients \(noise: Distributed\)"
    ) as refusal:
        answer(demanded, begin(offered))
    assert refusal.value.reason == Reason.NOISE


@pytest.mark.parametrize(("demanded", "offered"), [(4.0, 4.0), (4.0, 10.0), (0.0, 0.1), (None, 0.0)])
def test_enough_noise_is_not(demanded: float | None, offered: float) -> None:
    assert answer(demanded, begin(offered))


def test_an_evaluation_needs_none() -> None:
    message = begin(0.0, purpose=pb.SecureBegin.EVALUATE)
    del message.begin.layout.tensors[:]
    assert answer(4.0, message)
