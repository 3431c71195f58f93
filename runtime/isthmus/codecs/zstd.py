"""Lossless compression of the whole stream: Zstandard (RFC 8878), in independent blocks.

Each block is the 32-bit little-endian length of a Zstandard frame, followed by the frame, which holds at most
:data:`BLOCK_BYTES` of content and states the size in its header. So a receiver can decode data as they arrive, and the
memory that it uses is bounded whatever the sender claims. Quantized values are close to random: expect savings of a few
per cent on Int8, and more if many values are zero.
"""

from collections.abc import Iterable, Iterator

import zstandard

from ..tensors import Data
from .base import CodecError

BLOCK_BYTES = 1 << 20
_LENGTH_BYTES = 4
# ZSTD_compressBound for a block.
_LARGEST_FRAME = BLOCK_BYTES + (BLOCK_BYTES >> 8) + 64
# Level 1 is as fast as the quantizers; higher levels compress their output hardly any better.
_LEVEL = 1


def compressed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Compress pieces of at most :data:`BLOCK_BYTES` to blocks."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    for piece in filter(None, pieces):
        frame = compressor.compress(piece)
        yield len(frame).to_bytes(_LENGTH_BYTES, "little") + frame


class Unpacker:
    """Decompressor of a stream that arrives in pieces of any size."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=BLOCK_BYTES)

    @property
    def empty(self) -> bool:
        """True unless a block is incomplete."""
        return not self._buffer

    def unpack(self, data: Data) -> Iterator[bytes]:
        """Yield the contents of the blocks that ``data`` completes. Raises :class:`CodecError`."""
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTH_BYTES:
            length = int.from_bytes(self._buffer[start : start + _LENGTH_BYTES], "little")
            if not 0 < length <= _LARGEST_FRAME:
                raise CodecError(f"a Zstd block of {length} bytes")
            if len(self._buffer) - start - _LENGTH_BYTES < length:
                break
            start += _LENGTH_BYTES
            yield self._content(bytes(self._buffer[start : start + length]))
            start += length
        del self._buffer[:start]

    def _content(self, frame: bytes) -> bytes:
        try:
            size = zstandard.get_frame_parameters(frame).content_size
            # An unknown size is reported as 2**64 - 1.
            if not size:  # a stream of such blocks would never make progress
                raise CodecError("a Zstd block without content")
            if size > BLOCK_BYTES:
                raise CodecError("a Zstd block that would unpack to more than is allowed")
            return self._decompressor.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CodecError(f"a damaged Zstd block ({error})") from None
