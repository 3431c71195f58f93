"""Decoding of global models and encoding of updates, with the state that a client keeps for it between rounds."""

from collections.abc import Callable, Collection, Mapping

import torch

from isthmus_contracts.pb import federation_pb2 as pb

from ...codecs import KNOWN, Chain, Decoder, Encoded, Residual, download_seed, encode, parse_chain, upload_seed
from ...tensors import RawDecoder, State, snapshot
from ...views import View, views_of
from .error_feedback import ErrorFeedback
from .session import Session

_DELTA = "Delta"


class ClientCompression:
    """Decoder of global models and encoder of updates, with the codecs that the offers request.

    Beside the script's own model it holds at most: the memory of the global model as it was pulled (which an update
    that is sent raw reuses), the encoded update and, with TopK, the residual (half a model) and the next residual,
    until the update is accepted.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._base: State = {}
        self._base_digest = ""
        self._decodable: tuple[str, ...] = KNOWN
        self._feedback: ErrorFeedback | None = None
        self._room: State = {}
        self.views: tuple[View, ...] = ()
        """Views in the newest global model."""

    def request(self, offer: pb.Offer) -> pb.PullRequest:
        """Return the request for an offer's model."""
        return pb.PullRequest(
            job_uid=self._session.job_uid,
            round=offer.base_round,
            digest=offer.base_digest,
            codecs=self._decodable,
            base_digest=self._base_digest,
        )

    def reception(self, header: pb.ModelHeader) -> RawDecoder | Decoder:
        """Return the receiver of a global model. Raises :class:`TransferError`."""
        self.views = views_of(header.views)
        room, self._room = self._room, {}
        if not header.codecs:
            if not room and not self._base_digest:
                room, self._base = self._base, {}  # of a secure round that this client did not finish
            return RawDecoder(header.tensors, room)
        chain = parse_chain(header.codecs)
        return Decoder(header.tensors, chain, download_seed(header.round), self._base, room)

    def request_uncompressed(self) -> None:
        """Request models without codecs from now on, after one could not be decoded."""
        self._decodable, self._base, self._base_digest = (), {}, ""

    def on_pulled(self, offer: pb.Offer, state: State, live: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Keep an offer's model, now loaded into the script's, if the job encodes or masks differences from it."""
        self._base, self._base_digest = {}, ""
        # A model may have adopted the loaded tensors instead of copying them; training would then change them.
        own = {tensor.data_ptr() for tensor in live().values() if isinstance(tensor, torch.Tensor)}
        delta = _DELTA in (*offer.codecs[:1], *offer.model_codecs[:1])
        if not delta and not offer.secure:
            self._room = {name: tensor for name, tensor in state.items() if tensor.data_ptr() not in own}
        else:
            self._base = {
                name: tensor.clone() if tensor.data_ptr() in own else tensor for name, tensor in state.items()
            }
            self._base_digest = offer.base_digest if delta else ""

    @property
    def base(self) -> State:
        """The newest global model, if updates are differences from it."""
        return self._base

    @property
    def keeps_base(self) -> bool:
        """True if the next global model may be encoded as a difference from this one."""
        return bool(self._base_digest)

    def encode_update(
        self, offer: pb.Offer, live: Mapping[str, torch.Tensor], buffers: Collection[str], frozen: Collection[str]
    ) -> State | Encoded:
        """Return the script's trained weights as they will be sent, independent of later changes to them.

        ``buffers``: names of tensors that no optimizer trains; ``frozen``: of parameters that have no gradient.
        Raises :class:`TransferError`.
        """
        chain = parse_chain(offer.codecs)
        if not chain.names:
            room, self._room = self._room, {}
            return snapshot(live, room)
        context = self._session.context
        seed = upload_seed(offer.round, context.pool, context.index)
        wanted = _DELTA in offer.model_codecs
        keep_base = wanted or not chain.sparse
        residual = self._residual(chain)
        encoded = encode(
            live, chain, seed, self._base, residual, raw=buffers, frozen=frozen, keep_base=keep_base
        )  # fmt: skip
        if not wanted:
            # The next global model reuses the remaining memory of this one.
            self._room = self._room or self._base
            self._base, self._base_digest = {}, ""
        return encoded

    def on_dropped(self, update: State | Encoded) -> None:
        """Reuse the memory of an update that is no longer needed."""
        if not isinstance(update, Encoded):
            # Masked updates are integers in the memory of the model from which they were trained.
            self._room = {
                name: tensor.view(torch.float32) if tensor.dtype == torch.int32 else tensor
                for name, tensor in update.items()
            }

    def on_accepted(self, update: State | Encoded, round_number: int) -> None:
        """Make the values that an accepted update left out the residual. Calling it again has no effect."""
        if isinstance(update, Encoded) and update.residual is not None:
            assert self._feedback is not None
            residual, update.residual = update.residual, None
            self._feedback.advance(residual, round_number)

    def masked_residual(self, keep: float) -> Residual | None:
        """Return what masked updates have left out so far. ``keep``: share of the coordinates that travel, or 0."""
        return self._stored_residual() if keep else None

    def on_masked_committed(self, residual: Residual | None, round_number: int) -> None:
        """Replace the residual by that of a masked update which is part of a committed model."""
        if residual is not None and self._feedback is not None:
            self._feedback.advance(residual, round_number)

    def _residual(self, chain: Chain) -> Residual | None:
        return self._stored_residual() if chain.sparse else None

    def _stored_residual(self) -> Residual | None:
        if self._feedback is None:
            self._feedback = ErrorFeedback(self._session.job_uid, self._session.context)
        return self._feedback.residual
