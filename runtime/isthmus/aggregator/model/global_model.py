"""The global model, in the form in which it is served."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from isthmus_contracts.api.compression import NONE
from isthmus_contracts.pb import federation_pb2 as pb

from ...codecs import Encoded
from ...framing import model_messages
from ...tensors import CHUNK_BYTES, chunk_bytes, specs_of
from ...views import View
from ..storage.checkpoints import Checkpoint
from .compression import Broadcast
from .raw_stream import RawStream

# A model up to this size is sent with the offers, which saves a call for each client and round. Larger messages would
# occupy memory in the queues.
INLINE_BYTES = 256 << 10


@dataclass(frozen=True)
class GlobalModel:
    """A committed model, ready to be sent."""

    checkpoint: Checkpoint
    specs: list[pb.TensorSpec]
    broadcast: Broadcast | None
    """Its encoded form, if the job uses one."""
    chunk_bytes: int = CHUNK_BYTES
    """Bytes of data in each message of a raw stream."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, clients: int, broadcast: Broadcast | None = None) -> "GlobalModel":
        """Return a checkpoint's model, for the given number of clients."""
        return cls(checkpoint, specs_of(checkpoint.state), broadcast, chunk_bytes(clients))

    def stream(self, request: pb.PullRequest) -> tuple[Iterable[tuple[bytes, int]], str]:
        """Return the messages of a Pull with the number of data bytes in each, and the name of the encoding.

        The messages of a raw model are shared by all clients.
        """
        if self.broadcast is not None and self.broadcast.suits(request):
            encoded = self.broadcast.encoded
            return self._encode(encoded), str(encoded.chain)
        return self._raw, NONE

    def _encode(self, encoded: Encoded) -> Iterator[tuple[bytes, int]]:
        return model_messages(self._header(encoded.specs, encoded.chain.names), encoded.chunks, encoded.checksum)

    @cached_property
    def inline(self) -> bytes:
        """The reply to a Pull, for an offer, if it is small and the same for all clients; otherwise empty."""
        if self.broadcast is None and self.size <= min(INLINE_BYTES, self.chunk_bytes):
            return self._raw[0][0]
        return b""

    @cached_property
    def _raw(self) -> RawStream:
        return RawStream(self._header(self.specs), self.checkpoint.file, self.chunk_bytes)

    def _header(self, specs: list[pb.TensorSpec], codecs: Iterable[str] = ()) -> pb.ModelHeader:
        views = [view.message() for view in self.views]
        return pb.ModelHeader(round=self.round, digest=self.digest, tensors=specs, codecs=codecs, views=views)

    @cached_property
    def views(self) -> tuple[View, ...]:
        return self.checkpoint.views

    @property
    def round(self) -> int:
        return self.checkpoint.round

    @property
    def digest(self) -> str:
        return self.checkpoint.digest

    @cached_property
    def header_bytes(self) -> int:
        """Size in bytes of the part of an update's header that announces the model's tensors."""
        views = self._header([]).ByteSize()
        return sum(spec.ByteSize() + 4 for spec in self.specs) + views

    @cached_property
    def size(self) -> int:
        """Size of all tensors in bytes."""
        return sum(spec.size for spec in self.specs)
