"""A client's main loop, from the first connection to the end of training, in the process that holds the session."""

import base64
import logging
import threading
from collections.abc import Callable, Iterator
from queue import Empty

from isthmus_contracts.pb import federation_pb2 as pb

from ...malloc_tuning import keep_chunk_memory
from ...tensors import snapshot
from ..context import Context
from ..corrections.factory import CorrectionState, make_correction
from ..errors import FederationError
from ..evaluation import Evaluate, measure
from ..round import Round, open_round
from ..session.compression import ClientCompression
from ..session.pending_updates import PendingUpdates
from ..session.secure.held_update import Numbers
from ..session.secure.participant import NotMaskedError
from ..session.session import GIVE_UP_AFTER, Session
from ..session.transfer import FinishedUpdate, OutdatedError, pull, push, send_evaluation
from ..state.shared_state import Model, Parameters, SharedState
from ..state.unchanged_model import UnchangedModelCheck
from .process_watch import EXIT_TERMINATED, ProcessWatch, error_line, traceback_tail
from .ranks import Ranks
from .secure_results import SecureResults

log = logging.getLogger("isthmus")

# Time for the other ranks to learn that a failure or a signal ends this one. Seconds.
_CLOSE_TIMEOUT = 5.0
# A buffer that holds a mask of -inf, or of the smallest float, is deliberate.
_INVALID_VALUES_ADVICE = (
    ": leave it out, with isthmus.rounds(..., parameters=...) or, where it is a buffer, by registering it with"
    " persistent=False"
)


class ClientLoop:
    """Carries out the aggregator's offers, and leads the other ranks of the client through them."""

    def __init__(
        self,
        model: Model,
        evaluate: Evaluate | None,
        parameters: Parameters,
        context: Context,
        ranks: Ranks,
        stopping: threading.Event,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._evaluate = evaluate
        self._ranks = ranks
        self._evaluation = pb.Evaluation()  # the newest
        keep_chunk_memory()
        self._session = Session(context, evaluates=evaluate is not None, stopping=stopping)
        self._stopping = stopping
        self._compression = ClientCompression(self._session)
        self._secure = SecureResults(self._session, ranks.check)
        self._counted: FinishedUpdate | None = None  # accepted under masks; its round is not committed yet
        self._pending = PendingUpdates(lambda update: self._compression.on_dropped(update.tensors))
        self._corrections = CorrectionState(self._session)
        self._unchanged = UnchangedModelCheck()

    def rounds(self) -> Iterator[Round]:
        """Yield the rounds that the aggregator asks this client to train, until training is complete."""
        watch = ProcessWatch(self._stopping, self._report, self._close, self._abandon)
        timeout = _CLOSE_TIMEOUT
        try:
            self._shared = SharedState(self._model, self._parameters)
            self._ranks.use_device_of(self._shared.live().values())
            while (offer := self._next_offer()) is not None:
                self._session.site.require_protection(offer)
                match offer.kind:
                    case pb.Offer.INITIALIZE:
                        self._submit_initial_weights()
                    case pb.Offer.EVALUATE:
                        self._evaluate_only(offer)
                    case pb.Offer.TRAIN:
                        yield from self._train(offer)
            log.info("training is complete")
            # The other ranks may still be evaluating the final model.
            self._ranks.send_command("complete")
            timeout = GIVE_UP_AFTER
        except GeneratorExit:
            watch.leave()
            raise
        except SystemExit:
            self._end(watch, timeout)
            raise
        except BaseException as error:
            if isinstance(error, Exception):
                self._report(error)
            else:
                self._ranks.fail(error)
            self._end(watch, timeout)
            raise
        self._end(watch, timeout)

    def _end(self, watch: ProcessWatch, timeout: float) -> None:
        watch.end()
        self._session.close()
        self._ranks.close(timeout)

    def _train(self, offer: pb.Offer) -> Iterator[Round]:
        if self._evaluation.model_digest == offer.base_digest and offer.base_round and not offer.secure:
            # An aggregator that restarted may ask for it again. It does not count an evaluation twice.
            send_evaluation(self._session, self._evaluation)
        for update in self._pending.due(offer):
            # Either the aggregator restarted between this client's submit and its commit, or the update can count now.
            self._push(update, offer)
        if self._pending.has_answer(offer) or (offer.secure and not self._secure.may_train(offer)):
            return
        self._pending.begin(offer)
        self._counted = None
        if not self._load(offer):
            return
        self._session.works_on(offer.round, offer.base_digest)
        self._session.stages.enter("pulling")
        try:
            inputs = self._corrections.inputs(offer)
        except OutdatedError:
            return
        if offer.secure:
            self._secure.on_companion(inputs.companion)
        self._ranks.send_command("train", offer=base64.b64encode(offer.SerializeToString()).decode())
        self._ranks.share(inputs.memory)
        self._ranks.share(inputs.companion)
        evaluation = self._evaluation.metrics if self._evaluation.model_digest == offer.base_digest else {}
        correction = make_correction(offer, self._shared.names(), evaluation, inputs)

        def finish(num_examples: int, metrics: dict[str, float]) -> Callable[[], None]:
            self._session.require_own_process()
            self._session.stages.enter("encoding")
            scalars, updated_state = correction.scalars(metrics), correction.updated_state()
            live = self._shared.live()
            self._unchanged.compare(live, offer.round)
            if offer.secure:
                numbers = Numbers(num_examples, metrics, scalars, self._evaluation_of(offer))
                held = self._secure.update(offer, self._compression, live, numbers, updated_state)
                correction.close()
                if held is not None:
                    self._pending.keep(held, folds_late=False)
                return lambda: self._submit(held, offer)
            buffers = self._shared.buffers(live)
            state = self._compression.encode_update(offer, live, buffers, self._shared.frozen(live))
            seconds = self._session.stages.take()
            update = FinishedUpdate(
                offer.round, offer.base_digest, num_examples, metrics, state, buffers, scalars, updated_state, seconds,
                views=self._shared.views(),
            )  # fmt: skip
            correction.close()
            self._pending.keep(update, folds_late=offer.folds_late)
            return lambda: self._submit(update, offer)

        self._unchanged.begin(self._shared.live())
        self._session.stages.enter("training")
        told_to_stop = lambda: self._ranks.told_to_stop(self._stopping.is_set())  # noqa: E731
        yield from open_round(offer, correction, finish, told_to_stop, self._session.require_own_process)

    def _submit(self, update: FinishedUpdate | None, offer: pb.Offer) -> None:
        if update is not None:
            self._push(update, offer)
        self._ranks.send_command("submitted")

    def _submit_initial_weights(self) -> None:
        live = self._shared.live()
        initial = snapshot(live)
        buffers, views = self._shared.buffers(live), self._shared.views()
        frozen = self._shared.frozen(live)
        reply = push(self._session, FinishedUpdate(0, "", 1, {}, initial, buffers, views=views, frozen=frozen))
        self._compression.on_dropped(initial)
        if reply.verdict == pb.PushReply.INVALID:  # for any other verdict, the weights of another client were used
            advice = _INVALID_VALUES_ADVICE if reply.reason in ("non_finite", "range") else ""
            raise FederationError(f"the initial weights were refused: {reply.message}{advice}")

    def _push(self, update: FinishedUpdate, offer: pb.Offer) -> None:
        self._session.stages.enter("pushing")
        try:
            reply = push(self._session, update) if update.held is None else self._secure.push(update, offer)
        except NotMaskedError as reason:
            log.warning("round %d: update not used: %s", update.round, reason)
            return
        finally:
            self._session.stages.enter("waiting")
        self._pending.on_reply(update, reply)
        if reply.verdict == pb.PushReply.ACCEPTED:
            self._compression.on_accepted(update.tensors, update.round)
            if update.held is None:
                self._corrections.on_accepted(update)
            else:  # the sum may be lost, and the round trained again: with the state from before
                self._counted = update
            log.info("round %d: update accepted", update.round)
            return
        if reply.verdict == pb.PushReply.INVALID:
            log.error("round %d: update refused: %s", update.round, reply.message)
        else:
            # A restarted aggregator replies so until it has started the round again, and then repeats the offer.
            log.warning("round %d: update not used: %s", update.round, reply.message)

    def _load(self, offer: pb.Offer) -> bool:
        """Load the offer's global weights and evaluate them; return false if the aggregator has moved on."""
        self._session.stages.enter("pulling")
        try:
            state = pull(self._session, offer, self._compression, self._shared.require_fitting)
        except OutdatedError:
            return False
        self._shared.require(self._compression.views)
        # The quality of untrained weights matters only to a strategy that uses the loss.
        wanted = self._evaluate is not None and bool(offer.base_round or offer.algorithm == "QFedAvg")
        measuring = wanted and self._evaluation.model_digest != offer.base_digest
        self._ranks.send_command("model", measuring="yes" if measuring else "")
        self._ranks.share(state)
        self._shared.load(state)
        self._compression.on_pulled(offer, state, self._shared.live)
        if measuring:
            assert self._evaluate is not None
            self._session.stages.enter("evaluating")
            self._evaluation = measure(self._evaluate, offer)
        if offer.secure:
            self._secure.on_loaded(self._compression.base)
        elif wanted and offer.base_round:
            send_evaluation(self._session, self._evaluation)
        return True

    def _evaluate_only(self, offer: pb.Offer) -> None:
        """Evaluate an offer's model without training."""
        if self._load(offer) and offer.secure:
            self._secure.evaluation(offer, Numbers(evaluation=self._evaluation_of(offer)))

    def _evaluation_of(self, offer: pb.Offer) -> pb.Evaluation | None:
        """Return the evaluation of an offer's model, if there is one and it counts."""
        return self._evaluation if offer.base_round and self._evaluation.model_digest == offer.base_digest else None

    def _on_commit(self, round_number: int) -> None:
        """Take note that a round is over."""
        if self._counted is not None and self._counted.round <= round_number:
            self._corrections.on_accepted(self._counted)
            if (held := self._counted.held) is not None:
                self._compression.on_masked_committed(held.residual, held.work.round)
            self._counted = None
        self._pending.on_commit(round_number, self._session.aggregator)

    def _next_offer(self) -> pb.Offer | None:
        """Wait for an offer; return ``None`` once training is complete."""
        self._session.require_own_process()
        self._session.stages.enter("waiting")
        newest: pb.Offer | None = None
        while True:
            self._ranks.check()
            if self._ranks.others_told_to_stop():
                self._stopping.set()
            if self._stopping.is_set():
                self._session.send(pb.ClientMessage(leaving=pb.Leaving(reason="the process was told to stop")))
                self._ranks.send_command("terminated")
                raise SystemExit(EXIT_TERMINATED)
            try:
                # The timeout lets signals be handled. Of several offers only the newest counts.
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
                    # An offer that follows at once also announces the commit of its base model.
                    self._on_commit(newest.base_round)
                case "committed":
                    self._on_commit(message.committed.round)
                    if newest is not None and newest.kind == pb.Offer.TRAIN and newest.round <= message.committed.round:
                        newest = None  # this round is over: a newer offer follows, or the end
                case "stop":
                    if message.stop.reason == pb.Stop.COMPLETE:
                        return None
                    raise FederationError(f"the aggregator ended this client's participation: {message.stop.message}")

    def _report(self, error: BaseException) -> None:
        """Report the error that ended this client to the aggregator and to the other ranks."""
        if not self._session.closed:
            failure = pb.Failure(message=error_line(error), traceback=traceback_tail(error))
            self._session.send(pb.ClientMessage(failure=failure))
            self._ranks.fail(error)

    def _close(self) -> None:
        """Close the connections after the script has left its loop."""
        if not self._session.closed:
            self._ranks.fail(None)
            self._session.close()
            self._ranks.close(_CLOSE_TIMEOUT)

    def _abandon(self) -> None:
        """Give up the connections in a fork of this process."""
        self._session.abandon()
        self._ranks.abandon()
