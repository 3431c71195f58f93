"""Results under secure aggregation: how often they are trained, made and sent, and when a wait for masks ends."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from isthmus.client.errors import FederationError
from isthmus.client.loop import secure_results
from isthmus.client.loop.secure_results import SecureResults
from isthmus.client.session.secure.held_update import HeldUpdate, Numbers
from isthmus.client.session.secure.participant import Masked, NotMaskedError
from isthmus.client.session.session import Incoming
from isthmus.client.session.stage_timer import StageTimer
from isthmus.client.session.transfer import FinishedUpdate
from isthmus.secure_aggregation.basis import Settings, basis_digest
from isthmus.secure_aggregation.encoding.scalars import SCALARS
from isthmus.secure_aggregation.layout import Parameters, evaluation_layout, make_layout
from isthmus.tensors import State, sha256_of
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa

BASE = {"weight": torch.linspace(-1, 1, 50)}
PARAMETERS = Parameters(metrics={"loss": 100.0})
TRAIN, EVALUATE = sa.SecureBegin.TRAIN, sa.SecureBegin.EVALUATE


class Participant:
    """A stand-in for the protocol: instances that are ready, in order."""

    def __init__(self, *incarnations: int) -> None:
        self.incarnations = list(incarnations)
        self.masked_updates: list[tuple[int, HeldUpdate]] = []

    def in_background(self, job: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(job())
        return future

    def layout(self, work: object, interrupted: Callable[[], str]) -> sa.SecureLayout:
        if reason := interrupted():
            raise NotMaskedError(reason)
        return make_layout(PARAMETERS, BASE)

    def evaluation(self, interrupted: Callable[[], str]) -> sa.SecureBegin:
        return sa.SecureBegin(round=4, purpose=EVALUATE, layout=evaluation_layout(PARAMETERS))

    @contextmanager
    def masked(self, update: HeldUpdate, interrupted: Callable[[], str], above: int) -> Iterator[Masked]:
        newest = max(self.incarnations, default=0)
        if newest <= above:
            raise NotMaskedError(interrupted() or "nothing newer")
        self.masked_updates.append((newest, update))
        yield Masked(newest, update.tensors)

    def newer_than(self, incarnation: int, update: HeldUpdate) -> bool:
        return max(self.incarnations) > incarnation


class Session:
    """The parts of a session that results need."""

    closed = False

    def __init__(self, *incarnations: int) -> None:
        self.secure = Participant(*incarnations)
        self.incoming = Incoming()
        self.over, self.stopping = threading.Event(), threading.Event()
        self.stages = StageTimer()


class Compression:
    keeps_base = False

    def __init__(self) -> None:
        self.base: State = {name: tensor.clone() for name, tensor in BASE.items()}

    def masked_residual(self, keep: float) -> None:
        assert not keep


def offer(number: int = 3, attempt: int = 0, kind: "pb.Offer.Kind.ValueType" = pb.Offer.TRAIN) -> pb.Offer:
    return pb.Offer(
        kind=kind, round=number, base_round=number - 1, base_digest="d", secure=True, secure_attempt=attempt
    )


def results(session: Session, check: Callable[[], None] = lambda: None) -> SecureResults:
    return SecureResults(session, check)  # type: ignore[arg-type]


def update(made: SecureResults, of: pb.Offer) -> FinishedUpdate | None:
    compression = Compression()
    made.on_loaded(compression.base)
    numbers = Numbers(5, {"loss": 1.0})
    return made.update(of, compression, {"weight": BASE["weight"] + 0.1}, numbers, None)  # type: ignore[arg-type]


def test_a_round_is_trained_again_once(caplog: pytest.LogCaptureFixture) -> None:
    made = results(Session())
    assert made.may_train(offer())
    assert made.may_train(offer())  # a repeated offer
    assert made.may_train(offer(attempt=1))
    assert not made.may_train(offer(attempt=2))
    assert "round 3: not trained again: this client has trained it 2 times already" in caplog.text
    assert made.may_train(offer(number=4))
    assert made.may_train(offer(number=4, attempt=1))


def test_nothing_of_an_update_is_in_clear() -> None:
    made = results(Session(7))
    finished = update(made, offer())
    assert finished is not None and finished.held is not None
    assert (finished.num_examples, finished.metrics, finished.scalars, finished.seconds) == (0, {}, {}, {})
    assert list(finished.tensors) == ["weight", SCALARS]  # type: ignore[arg-type]
    assert not any(tensor.is_floating_point() for tensor in finished.held.tensors.values())
    assert finished.held.base_sha256 == basis_digest(sha256_of(BASE), Settings("", {}, {}), "")
    assert finished.secure_attempt == 0


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of instances to which updates are pushed; each is accepted."""
    incarnations: list[int] = []

    def push(session: object, finished: object, masked: Masked) -> pb.PushReply:
        incarnations.append(masked.incarnation)
        return pb.PushReply(verdict=pb.PushReply.ACCEPTED)

    monkeypatch.setattr(secure_results, "push", push)
    return incarnations


def test_an_instance_gets_an_update_once_and_a_newer_one_again(pushed: list[int]) -> None:
    session = Session(7)
    made = results(session)
    finished = update(made, offer())
    assert finished is not None
    made.push(finished, offer())
    with pytest.raises(NotMaskedError, match="nothing newer"):
        made.push(finished, offer())
    session.secure.incarnations.append(9)
    made.push(finished, offer())
    assert pushed == [7, 9]


def test_an_update_goes_to_the_instance_that_began_during_its_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(7)
    replies = iter([pb.PushReply(verdict=pb.PushReply.STALE), pb.PushReply(verdict=pb.PushReply.ACCEPTED)])

    def push(*_: object) -> pb.PushReply:
        session.secure.incarnations = [8]
        return next(replies)

    monkeypatch.setattr(secure_results, "push", push)
    made = results(session)
    finished = update(made, offer())
    assert finished is not None
    assert made.push(finished, offer()).verdict == pb.PushReply.ACCEPTED
    assert [incarnation for incarnation, _ in session.secure.masked_updates] == [7, 8]


def test_an_evaluation_is_rounded_once(pushed: list[int]) -> None:
    """Roundings of the same numbers, opened one by one, would tell more than one."""
    session = Session(7)
    made = results(session)
    made.on_loaded(BASE)
    numbers = Numbers(evaluation=pb.Evaluation(num_examples=3, metrics={"loss": 0.123456789}))
    made.evaluation(offer(kind=pb.Offer.EVALUATE), numbers)
    session.secure.incarnations.append(8)
    made.evaluation(offer(kind=pb.Offer.EVALUATE), numbers)
    (_, first), (_, second) = session.secure.masked_updates
    assert first is second and pushed == [7, 8]


def test_waiting_ends_when_the_aggregator_goes_on() -> None:
    session = Session()
    made = results(session)
    session.incoming.put(pb.ServerMessage(committed=pb.Committed(round=2)))
    session.incoming.put(pb.ServerMessage(offer=offer()))
    assert update(made, offer()) is not None
    session.incoming.put(pb.ServerMessage(offer=offer(number=4)))
    assert update(made, offer()) is None


def test_a_stopping_process_waits_for_masks_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session()
    session.stopping.set()
    assert update(results(session), offer()) is not None
    monkeypatch.setattr(secure_results, "_WAIT_WHEN_STOPPING", -1.0)
    assert update(results(session), offer()) is None


def test_a_failed_rank_ends_the_wait() -> None:
    def failed() -> None:
        raise FederationError("rank 1 of this client has gone")

    with pytest.raises(FederationError, match="rank 1"):
        update(results(Session(), failed), offer())


def test_weights_that_cannot_be_sent_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    made, compression = results(Session(7)), Compression()
    made.on_loaded(compression.base)
    broken = {"weight": torch.full((50,), float("nan"))}
    assert made.update(offer(), compression, broken, Numbers(5), None) is None  # type: ignore[arg-type]
    assert "round 3: update refused: weight holds NaN or infinity" in caplog.text


@pytest.mark.parametrize(
    ("message", "overtakes"),
    [
        (pb.ServerMessage(committed=pb.Committed(round=2)), False),
        (pb.ServerMessage(committed=pb.Committed(round=3)), True),
        (pb.ServerMessage(offer=offer()), False),
        (pb.ServerMessage(offer=offer(attempt=1)), True),
        (pb.ServerMessage(offer=offer(number=4)), True),
        (pb.ServerMessage(stop=pb.Stop(reason=pb.Stop.COMPLETE)), True),
        (FederationError("no contact"), True),
    ],
)
def test_messages_that_overtake_a_round(message: "pb.ServerMessage | FederationError", overtakes: bool) -> None:
    incoming = Incoming()
    assert not incoming.overtakes(offer())
    incoming.put(message)
    assert incoming.overtakes(offer()) == overtakes
