"""The job's compression, as its aggregator carries it out."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.pb import federation_pb2 as pb

from ...codecs import KNOWN, Chain, Decoder, Encoded, download_seed, encode, parse_chain, upload_seed
from ...strategies import StrategyError
from ...tensors import RawDecoder, State, non_finite


@dataclass(frozen=True)
class Broadcast:
    """A global model as it was encoded, once for all clients."""

    encoded: Encoded
    base_digest: str
    """Of the model that a Delta is taken from; empty: there is no Delta."""

    def suits(self, request: pb.PullRequest) -> bool:
        """Return whether a client can decode it: it has the codecs and, for a Delta, the base."""
        chain = self.encoded.chain
        known = {name.split("=")[0] for name in chain.names} <= set(request.codecs)
        return known and (not chain.delta or request.base_digest == self.base_digest)


class Compression:
    """Decodes updates, and encodes the global model.

    With a lossy download the global model *is* what clients decode: it is settled before its checkpoint is written, so
    that every client sees the same weights whether they came encoded or raw, updates are differences from exactly
    these, and a restarted aggregator (which serves its newest model raw) needs nothing but the checkpoint.
    """

    def __init__(self, spec: FederatedJobSpec) -> None:
        self._upload = parse_chain(spec.compression.upload_codecs)
        self._download = parse_chain(spec.compression.download_codecs)

    @property
    def upload(self) -> Chain:
        """What clients are asked to apply to their updates."""
        return self._upload

    @property
    def download(self) -> Chain:
        """What becomes of the global model."""
        return self._download

    def problem(self, header: pb.UpdateHeader) -> str | None:
        """Return what is wrong with an update's codecs. Raw updates are always welcome."""
        if not header.codecs or tuple(header.codecs) == self._upload.names:
            return None
        if unknown := [name for name in header.codecs if name.split("=")[0] not in KNOWN]:
            return f"unknown codecs: {', '.join(unknown)}"
        return f"the job's uploads are {self._upload}, not {'+'.join(header.codecs)}"

    def reception(self, header: pb.UpdateHeader, base: State | None, room: State) -> RawDecoder | Decoder:
        """Return what takes in an update that :meth:`problem` has nothing against. Raises :class:`TransferError`."""
        if not header.codecs:
            return RawDecoder(header.tensors, room)
        seed = upload_seed(header.round, header.pool, header.index)
        return Decoder(header.tensors, self._upload, seed, base, room)

    def next_model(
        self, finish: Callable[[], State], round_number: int, base: State, base_digest: str, buffers: Collection[str]
    ) -> tuple[State, Broadcast | None]:
        """The next global model, as clients will see it, and its encoded form, if it has one.

        ``buffers``, which no optimizer trains, travel raw.
        Raises :class:`StrategyError` where nobody could go on from it.
        """
        result = finish()
        if (bad := non_finite(result)) is not None:
            raise StrategyError(
                f"spec.strategy: round {round_number} came to NaN or infinity in {bad}: smaller steps may help "
                "(the server's learning rate and the clients')"
            )
        if not self._download.names:
            return result, None
        seed = download_seed(round_number)
        encoded = encode(result, self._download, seed, base, raw=buffers)
        broadcast = Broadcast(encoded, base_digest if self._download.delta else "")
        if self._download.codec is None:
            return result, broadcast
        del result  # before the decoded model takes as much memory
        return self._decoded(encoded, seed, base), broadcast

    def _decoded(self, encoded: Encoded, seed: str, base: State) -> State:
        decoder = Decoder(encoded.specs, self._download, seed, base)
        for chunk in encoded.chunks:
            decoder.write(chunk)
        return decoder.finish(encoded.checksum)
