"""Results of a client whose job uses secure aggregation: made once, held, and sent only under masks."""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import torch

from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa

from ...secure_aggregation.basis import Settings, basis_digest
from ...secure_aggregation.fixed_point import UpdateError
from ...secure_aggregation.parameters import MOST_ATTEMPTS
from ...tensors import State, sha256_of
from ..session.compression import ClientCompression
from ..session.secure.held_update import Numbers, Quantiser, Work
from ..session.secure.participant import NotMaskedError
from ..session.session import Session
from ..session.transfer import FinishedUpdate, push

log = logging.getLogger("isthmus")

# A process that was told to stop waits this long for masks; its scheduler ends it soon after. Seconds.
_WAIT_WHEN_STOPPING = 10.0


class SecureResults:
    """Maker and sender of held updates, which leave as soon as the masks of the newest instance are there."""

    def __init__(self, session: Session, check_ranks: Callable[[], None]) -> None:
        """``check_ranks``: raises if another rank of this client has failed."""
        self._session = session
        self._check_ranks = check_ranks
        # Digests of the offer's model, and of the strategy's auxiliary tensors if there are any.
        self._digest: Future[str] = Future()
        self._companion: Future[str] | None = None
        self._quantiser = Quantiser()
        self._round = self._attempt = self._repeats = 0
        self._evaluation: FinishedUpdate | None = None
        self._answered = (0, 0)  # numbers of an update and of the newest instance that has answered it

    def may_train(self, offer: pb.Offer) -> bool:
        """Return whether the offer's round may be trained, and count it."""
        if offer.round != self._round:
            self._round, self._attempt, self._repeats = offer.round, offer.secure_attempt, 0
        elif offer.secure_attempt != self._attempt:
            if self._repeats == MOST_ATTEMPTS:  # each further training would add to what is known of the data
                log.error(
                    "round %d: not trained again: this client has trained it %d times already", offer.round,
                    1 + self._repeats,
                )  # fmt: skip
                return False
            self._attempt, self._repeats = offer.secure_attempt, self._repeats + 1
        return True

    def on_loaded(self, base: State) -> None:
        """Begin to hash the offer's model, which must not change until the update is made."""
        self._digest = self._session.secure.in_background(lambda: sha256_of(base))
        self._companion = None

    def on_companion(self, companion: State) -> None:
        """Hash the auxiliary tensors of the offer's round, before a correction uses them."""
        self._companion = self._session.secure.in_background(lambda: sha256_of(companion)) if companion else None

    def _basis(self, offer: pb.Offer) -> str:
        """Return the digest of all that the offer's work starts from."""
        settings = Settings(offer.algorithm, dict(offer.parameters), dict(offer.config))
        return basis_digest(self._digest.result(), settings, self._companion.result() if self._companion else "")

    def update(
        self, offer: pb.Offer, compression: ClientCompression, live: Mapping[str, torch.Tensor], numbers: Numbers,
        updated_state: State | None,
    ) -> FinishedUpdate | None:  # fmt: skip
        """Return the update, to be held until its round is over, or ``None`` if it cannot be used."""
        work = Work(sa.SecureBegin.TRAIN, offer.round, offer.secure_attempt)
        try:
            layout = self._session.secure.layout(work, self._interruption(offer))
            self._session.stages.enter("encoding")
            held = self._quantiser.hold(
                work,
                layout,
                self._basis(offer),
                compression.base,
                live,
                numbers,
                consume=not compression.keeps_base,
                residual=compression.masked_residual(layout.keep_fraction),
            )
        except NotMaskedError as reason:
            log.warning("round %d: update not used: %s", offer.round, reason)
        except UpdateError as reason:
            log.error("round %d: update refused: %s", offer.round, reason)
        else:
            return FinishedUpdate(
                offer.round, offer.base_digest, 0, {}, held.tensors, updated_state=updated_state, held=held
            )  # fmt: skip
        return None

    def evaluation(self, offer: pb.Offer, numbers: Numbers) -> None:
        """Send the evaluation of a final model, in its own instance, unless the aggregator ends without it."""
        try:
            begin = self._session.secure.evaluation(self._interruption(offer))
            self.push(self._held_evaluation(offer, begin, numbers), offer)
        except NotMaskedError as reason:
            log.debug("the evaluation was not sent: %s", reason)

    def _held_evaluation(self, offer: pb.Offer, begin: sa.SecureBegin, numbers: Numbers) -> FinishedUpdate:
        """Return the evaluation as it was rounded once, also if the aggregator asks for it again."""
        work = Work(sa.SecureBegin.EVALUATE, begin.round, begin.attempt)
        known = self._evaluation
        if known is None or known.held is None or (known.held.work, known.base_digest) != (work, offer.base_digest):
            held = self._quantiser.hold(work, begin.layout, self._basis(offer), {}, {}, numbers, consume=False)
            known = self._evaluation = FinishedUpdate(work.round, offer.base_digest, 0, {}, held.tensors, held=held)
        return known

    def push(self, update: FinishedUpdate, offer: pb.Offer) -> pb.PushReply:
        """Send a held update under the masks of the newest instance, and again while a newer one wants it.

        What an instance has answered, whatever the verdict, is not sent to it again: if the offer is repeated, a newer
        instance is about to begin. Raises :class:`NotMaskedError` if none does, and :class:`FederationError`.
        """
        assert update.held is not None
        while True:
            answered = self._answered[1] if self._answered[0] == update.number else 0
            self._session.stages.enter("masking")
            with self._session.secure.masked(
                update.held, self._interruption(offer, patient=not answered), answered
            ) as masked:  # fmt: skip
                self._session.stages.enter("pushing")
                reply = push(self._session, update, masked)
            self._answered = update.number, masked.incarnation
            if not self._session.secure.newer_than(masked.incarnation, update.held):
                return reply

    def _interruption(self, offer: pb.Offer, *, patient: bool = True) -> Callable[[], str]:
        """Return a function that returns why work for an offer is pointless by now, or an empty string.

        ``patient``: a process that was told to stop may still wait for a few seconds.
        """
        told: float | None = None

        def reason() -> str:
            nonlocal told
            self._check_ranks()
            session = self._session
            if session.over.is_set() or session.closed:
                return "the aggregator has ended this client's participation"
            if session.incoming.overtakes(offer):
                return "the aggregator went on without it"
            if session.stopping.is_set():
                told = time.monotonic() if told is None else told
                if time.monotonic() - told > (_WAIT_WHEN_STOPPING if patient else 0.0):
                    return "the process was told to stop"
            return ""

        return reason
