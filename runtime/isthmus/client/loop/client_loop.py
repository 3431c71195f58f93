"""One client's part in a federation, from hello to stop: what the process that holds the session does."""

import base64
import logging
import threading
from collections.abc import Callable, Iterator
from queue import Empty

from isthmus_contracts.pb import federation_pb2 as pb

from ...malloc_tuning import keep_chunks
from ...tensors import snapshot
from ..context import Context
from ..corrections.factory import Corrections, correction_of
from ..errors import FederationError
from ..evaluation import Evaluate, measure
from ..round import Round
from ..session.compression import Compression
from ..session.pending_updates import HeldUpdates
from ..session.session import GIVE_UP_AFTER, Session
from ..session.transfer import FinishedUpdate, OutdatedError, pull, push
from ..state.shared_state import Model, Parameters, SharedState
from ..state.unchanged_model import Untouched
from .process import EXIT_TERMINATED, ProcessWatch, last_lines, one_line
from .ranks import Replicas

log = logging.getLogger("isthmus")

# How long other ranks may take to hear that a failure, or a signal, ends this one. Seconds.
_PARTING_SECONDS = 5.0
# A mask of -inf, or of the least float, among the buffers is no accident.
_OF_BAD_VALUES = (
    ": leave it out, with isthmus.rounds(..., parameters=...) or, where it is a buffer, by registering it with"
    " persistent=False"
)


class Participation:
    """Does what the offers ask for, and leads the other ranks through it."""

    def __init__(
        self,
        model: Model,
        evaluate: Evaluate | None,
        parameters: Parameters,
        place: Context,
        replicas: Replicas,
        stopping: threading.Event,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._evaluate = evaluate
        self._replicas = replicas
        self._evaluation = pb.Evaluation()  # the newest
        keep_chunks()
        self._session = Session(place, evaluates=evaluate is not None, stopping=stopping)
        self._stopping = stopping
        self._compression = Compression(self._session)
        self._held = HeldUpdates(lambda update: self._compression.dropped(update.tensors))
        self._corrections = Corrections(self._session)
        self._untouched = Untouched()

    def rounds(self) -> Iterator[Round]:
        watch = ProcessWatch(self._stopping, self._report, self._close, self._abandon)
        patience = _PARTING_SECONDS
        try:
            self._shared = SharedState(self._model, self._parameters)
            self._replicas.place(self._shared.live().values())
            while (offer := self._next_offer()) is not None:
                match offer.kind:
                    case pb.Offer.INITIALIZE:
                        self._hand_in_initial()
                    case pb.Offer.EVALUATE:
                        self._load(offer)
                    case pb.Offer.TRAIN:
                        yield from self._train(offer)
            log.info("training is complete")
            # The others may still be measuring the final model.
            self._replicas.say("complete")
            patience = GIVE_UP_AFTER
        except GeneratorExit:
            watch.leave()
            raise
        except SystemExit:
            self._end(watch, patience)
            raise
        except BaseException as error:
            if isinstance(error, Exception):
                self._report(error)
            else:
                self._replicas.fail(error)
            self._end(watch, patience)
            raise
        self._end(watch, patience)

    def _end(self, watch: ProcessWatch, patience: float) -> None:
        watch.end()
        self._session.close()
        self._replicas.close(patience)

    def _train(self, offer: pb.Offer) -> Iterator[Round]:
        if self._evaluation.model_digest == offer.base_digest and offer.base_round:
            # It may be an aggregator that restarted and asks again. What it has heard, it does not count twice.
            self._session.send(pb.ClientMessage(evaluation=self._evaluation))
        for update in self._held.asked(offer):
            # The aggregator restarted between our submit and its commit, or the update can count at last.
            self._push(update)
        if self._held.answer(offer):
            return
        self._held.begin(offer)
        if not self._load(offer):
            return
        self._session.works_on(offer.round, offer.base_digest)
        self._session.stages.enter("pulling")
        try:
            aids = self._corrections.gather(offer)
        except OutdatedError:
            return
        self._replicas.say("train", offer=base64.b64encode(offer.SerializeToString()).decode())
        self._replicas.share(aids.memory)
        self._replicas.share(aids.companion)
        measured = self._evaluation.metrics if self._evaluation.model_digest == offer.base_digest else {}
        correction = correction_of(offer, self._shared.names(), measured, aids)

        def finish(num_examples: int, metrics: dict[str, float]) -> Callable[[], None]:
            self._session.require_own_process()
            self._session.stages.enter("encoding")
            scalars, remembered = correction.scalars(metrics), correction.outcome()
            live = self._shared.live()
            self._untouched.compare(live, offer.round)
            buffers = self._shared.buffers(live)
            state = self._compression.finished(offer, live, buffers, self._shared.frozen(live))
            seconds = self._session.stages.take()
            work = (offer.round, offer.base_digest, num_examples, metrics, state, buffers, scalars, remembered, seconds)
            update = FinishedUpdate(*work, views=self._shared.views())
            correction.close()
            self._held.keep(update, folds_late=offer.folds_late)
            return lambda: self._hand_in(update)

        self._untouched.begin(self._shared.live())
        self._session.stages.enter("training")
        told = lambda: self._replicas.told_to_stop(self._stopping.is_set())  # noqa: E731
        rnd = Round(offer.round, dict(offer.config), correction, finish, told)
        try:
            yield rnd
        finally:
            correction.close()
        self._session.require_own_process()
        if not rnd.submitted:
            raise FederationError(f"round {rnd.number} ended without rnd.submit(num_examples=...)")

    def _hand_in(self, update: FinishedUpdate) -> None:
        self._push(update)
        self._replicas.say("submitted")

    def _hand_in_initial(self) -> None:
        live = self._shared.live()
        initial = snapshot(live)
        buffers, views = self._shared.buffers(live), self._shared.views()
        frozen = self._shared.frozen(live)
        reply = push(self._session, FinishedUpdate(0, "", 1, {}, initial, buffers, views=views, frozen=frozen))
        self._compression.dropped(initial)
        if reply.verdict == pb.PushReply.INVALID:  # all other answers mean that another client's have been taken
            advice = _OF_BAD_VALUES if reply.reason in ("non_finite", "range") else ""
            raise FederationError(f"the initial weights were refused: {reply.message}{advice}")

    def _push(self, update: FinishedUpdate) -> None:
        self._session.stages.enter("pushing")
        reply = push(self._session, update)
        self._session.stages.enter("waiting")
        self._held.answered(update, reply)
        if reply.verdict == pb.PushReply.ACCEPTED:
            self._compression.accepted(update.tensors, update.round)
            self._corrections.accepted(update)
            log.info("round %d: update accepted", update.round)
            return
        if reply.verdict == pb.PushReply.INVALID:
            log.error("round %d: update refused: %s", update.round, reply.message)
        else:
            # An aggregator that has just restarted says this before it has begun the round again: it will offer it.
            log.warning("round %d: update not used: %s", update.round, reply.message)

    def _load(self, offer: pb.Offer) -> bool:
        """Loads the offer's global weights and measures them; false where the aggregator has moved on."""
        self._session.stages.enter("pulling")
        try:
            state = pull(self._session, offer, self._compression, self._shared.require_fitting)
        except OutdatedError:
            return False
        self._shared.require(self._compression.views)
        # Nobody wants to know how good untrained weights are, except a strategy that goes by the loss.
        wanted = self._evaluate is not None and bool(offer.base_round or offer.algorithm == "QFedAvg")
        measuring = wanted and self._evaluation.model_digest != offer.base_digest
        self._replicas.say("model", measuring="yes" if measuring else "")
        self._replicas.share(state)
        self._shared.load(state)
        self._compression.pulled(offer, state, self._shared.live)
        if measuring:
            assert self._evaluate is not None
            self._session.stages.enter("evaluating")
            self._evaluation = measure(self._evaluate, offer)
        if wanted and offer.base_round:
            self._session.send(pb.ClientMessage(evaluation=self._evaluation))
        return True

    def _next_offer(self) -> pb.Offer | None:
        """Waits for work; ``None`` once training is complete."""
        self._session.require_own_process()
        self._session.stages.enter("waiting")
        newest: pb.Offer | None = None
        while True:
            self._replicas.check()
            if self._replicas.others_told_to_stop():
                self._stopping.set()
            if self._stopping.is_set():
                self._session.send(pb.ClientMessage(leaving=pb.Leaving(reason="the process was told to stop")))
                self._replicas.say("terminated")
                raise SystemExit(EXIT_TERMINATED)
            try:
                # The time-out lets signals through; of several offers only the newest counts.
                message = self._session.incoming.get(timeout=0.0 if newest else 0.5)
            except Empty:
                if newest is not None:
                    return newest
                continue
            if isinstance(message, FederationError):
                raise message
            match message.WhichOneof("message"):
                case "offer":
                    newest = message.offer
                    # Where an offer follows at once, the commit of the model that it starts from is not told by itself.
                    self._held.committed(newest.base_round, self._session.aggregator)
                case "committed":
                    self._held.committed(message.committed.round, self._session.aggregator)
                    if newest is not None and newest.kind == pb.Offer.TRAIN and newest.round <= message.committed.round:
                        newest = None  # it is over: a newer one follows, or the end
                case "stop":
                    if message.stop.reason == pb.Stop.COMPLETE:
                        return None
                    raise FederationError(f"the aggregator ended our part: {message.stop.message}")

    def _report(self, error: BaseException) -> None:
        """Tells the aggregator, and the other ranks, what this client died of."""
        if not self._session.closed:
            message = one_line(error)
            self._session.send(pb.ClientMessage(failure=pb.Failure(message=message, traceback=last_lines(error))))
            self._replicas.fail(error)

    def _close(self) -> None:
        """The script is not in its loop any more."""
        if not self._session.closed:
            self._replicas.fail(None)
            self._session.close()
            self._replicas.close(_PARTING_SECONDS)

    def _abandon(self) -> None:
        """Give up the connections in a fork of this process."""
        self._session.abandon()
        self._replicas.abandon()
