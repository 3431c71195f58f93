"""What a client keeps between rounds so that less has to travel."""

from collections.abc import Callable, Collection, Mapping

import torch

from isthmus_contracts.pb import federation_pb2 as pb

from ...codecs import KNOWN, Chain, Decoder, Encoded, Residual, download_seed, encode, parse_chain, upload_seed
from ...tensors import Reception, State, snapshot
from ...views import View, views_of
from .error_feedback import ErrorFeedback
from .session import Session

_DELTA = "Delta"


class Compression:
    """Decodes the global model, and encodes updates as the offers ask for.

    Beside the script's own model it holds, at most: the memory of the global model as it was pulled (where an update
    finds its place that travels raw), the finished update in its encoded form and, with TopK, the residual, which is
    half a model, and the next one, until the update is accepted.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._base: State = {}
        self._base_digest = ""
        self._decodable: tuple[str, ...] = KNOWN
        self._feedback: ErrorFeedback | None = None
        self._room: State = {}
        self.views: tuple[View, ...] = ()
        """Of the newest global model."""

    def request(self, offer: pb.Offer) -> pb.PullRequest:
        """Asks for an offer's model."""
        return pb.PullRequest(
            job_uid=self._session.job_uid,
            round=offer.base_round,
            digest=offer.base_digest,
            codecs=self._decodable,
            base_digest=self._base_digest,
        )

    def reception(self, header: pb.ModelHeader) -> Reception | Decoder:
        """Return what takes in a global model. Raises :class:`TransferError`."""
        self.views = views_of(header.views)
        room, self._room = self._room, {}
        if not header.codecs:
            return Reception(header.tensors, room)
        chain = parse_chain(header.codecs)
        return Decoder(header.tensors, chain, download_seed(header.round), self._base, room)

    def distrust(self) -> None:
        """The model could not be decoded: from now on it shall come raw."""
        self._decodable, self._base, self._base_digest = (), {}, ""

    def pulled(self, offer: pb.Offer, state: State, live: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Keeps an offer's model, which has been loaded into the script's, where the job takes differences from it."""
        self._base, self._base_digest = {}, ""
        # A model may have adopted what it loaded instead of copying it; training would change it under our hands.
        own = {tensor.data_ptr() for tensor in live().values() if isinstance(tensor, torch.Tensor)}
        if _DELTA not in (*offer.codecs[:1], *offer.model_codecs[:1]):
            self._room = {name: tensor for name, tensor in state.items() if tensor.data_ptr() not in own}
        else:
            self._base = {
                name: tensor.clone() if tensor.data_ptr() in own else tensor for name, tensor in state.items()
            }
            self._base_digest = offer.base_digest

    def finished(
        self, offer: pb.Offer, live: Mapping[str, torch.Tensor], buffers: Collection[str], frozen: Collection[str]
    ) -> State | Encoded:
        """The script's trained weights as they will travel, independent of what it does to them later.

        ``buffers``: names of what no optimizer trains; ``frozen``: of parameters that have no gradient.
        Raises :class:`TransferError`.
        """
        chain = parse_chain(offer.codecs)
        if not chain.names:
            room, self._room = self._room, {}
            return snapshot(live, room)
        place = self._session.context
        seed = upload_seed(offer.round, place.pool, place.index)
        wanted = _DELTA in offer.model_codecs
        keep_base = wanted or not chain.sparse
        residual = self._residual(chain)
        encoded = encode(
            live, chain, seed, self._base, residual, raw=buffers, frozen=frozen, keep_base=keep_base
        )  # fmt: skip
        if not wanted:
            # The next global model finds its place in what is left of this one.
            self._room = self._room or self._base
            self._base, self._base_digest = {}, ""
        return encoded

    def dropped(self, update: State | Encoded) -> None:
        """The update is not needed any more."""
        if not isinstance(update, Encoded):
            self._room = update

    def accepted(self, update: State | Encoded, round_number: int) -> None:
        """The update was accepted: what it left out is now the residual. Again: nothing happens."""
        if isinstance(update, Encoded) and update.residual is not None:
            assert self._feedback is not None
            residual, update.residual = update.residual, None
            self._feedback.advance(residual, round_number)

    def _residual(self, chain: Chain) -> Residual | None:
        if not chain.sparse:
            return None
        if self._feedback is None:
            self._feedback = ErrorFeedback(self._session.job_uid, self._session.context)
        return self._feedback.residual
