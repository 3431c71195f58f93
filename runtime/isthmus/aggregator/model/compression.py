"""Compression of updates and of the global model, on the aggregator's side."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.pb import federation_pb2 as pb

from ...codecs import KNOWN, Chain, Decoder, Encoded, download_seed, encode, parse_chain, upload_seed
from ...strategies import StrategyError
from ...tensors import RawDecoder, State, non_finite


@dataclass(frozen=True)
class Broadcast:
    """A global model, encoded once for all clients."""

    encoded: Encoded
    base_digest: str
    """Digest of the model from which a Delta is taken; empty without a Delta."""

    def suits(self, request: pb.PullRequest) -> bool:
        """Return whether the client can decode it: it has the codecs and, for a Delta, the base model."""
        chain = self.encoded.chain
        known = {name.split("=")[0] for name in chain.names} <= set(request.codecs)
        return known and (not chain.delta or request.base_digest == self.base_digest)


class Compression:
    """Decoder of updates and encoder of the global model.

    With a lossy download the global model *is* the decoded one. It is computed before the checkpoint is written. So
    every client gets the same weights, whether encoded or raw; updates are differences from exactly these; and a
    restarted aggregator, which serves its newest model raw, needs only the checkpoint.
    """

    def __init__(self, spec: FederatedJobSpec) -> None:
        self._upload = parse_chain(spec.compression.upload_codecs)
        self._download = parse_chain(spec.compression.download_codecs)

    @property
    def upload(self) -> Chain:
        """Codecs that clients are asked to apply to their updates."""
        return self._upload

    @property
    def download(self) -> Chain:
        """Codecs that are applied to the global model."""
        return self._download

    def problem(self, header: pb.UpdateHeader) -> str | None:
        """Return the reason why an update's codecs are invalid, or ``None``. Raw updates are always accepted."""
        if not header.codecs or tuple(header.codecs) == self._upload.names:
            return None
        if unknown := [name for name in header.codecs if name.split("=")[0] not in KNOWN]:
            return f"unknown codecs: {', '.join(unknown)}"
        return f"the job's uploads are {self._upload}, not {'+'.join(header.codecs)}"

    def reception(self, header: pb.UpdateHeader, base: State | None, room: State) -> RawDecoder | Decoder:
        """Return the receiver for an update that :meth:`problem` accepts. Raise :class:`TransferError`.

        ``base``: the model that the update was trained from. ``room``: tensors whose memory may be reused.
        """
        if not header.codecs:
            return RawDecoder(header.tensors, room)
        seed = upload_seed(header.round, header.pool, header.index)
        return Decoder(header.tensors, self._upload, seed, base, room)

    def next_model(
        self, finish: Callable[[], State], round_number: int, base: State, base_digest: str, buffers: Collection[str]
    ) -> tuple[State, Broadcast | None]:
        """Return the next global model, as clients will see it, and its encoded form, if there is one.

        ``finish``: computes the result. ``buffers``: names of the tensors that no optimizer trains; they are sent raw.
        Raises :class:`StrategyError` if the result holds NaN or infinity.
        """
        result = finish()
        if (bad := non_finite(result)) is not None:
            raise StrategyError(
                f"spec.strategy: the result of round {round_number} holds NaN or infinity in {bad}: smaller steps may"
                " help (the server's learning rate and the clients')"
            )
        if not self._download.names:
            return result, None
        seed = download_seed(round_number)
        encoded = encode(result, self._download, seed, base, raw=buffers)
        broadcast = Broadcast(encoded, base_digest if self._download.delta else "")
        if self._download.codec is None:
            return result, broadcast
        del result  # before the decoded model occupies as much memory
        return self._decoded(encoded, seed, base), broadcast

    def _decoded(self, encoded: Encoded, seed: str, base: State) -> State:
        decoder = Decoder(encoded.specs, self._download, seed, base)
        for chunk in encoded.chunks:
            decoder.write(chunk)
        return decoder.finish(encoded.checksum)
