"""Messages of a stream of tensors: a header, data, and a trailer in the last message.

A small model is a single message. Of a large model nearly all messages hold only data: these are encoded and decoded
here, exactly as protobuf would, since its own objects copy the data twice on either side.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import xxhash
from google.protobuf.message import DecodeError

from isthmus_contracts.pb import federation_pb2 as pb

from .codecs import Decoder
from .tensors import Data, RawDecoder, State, TransferError, TruncatedError

# The methods whose messages this module encodes and decodes itself, in place of protobuf's generated stubs.
SERVICE = pb.DESCRIPTOR.services_by_name["Federation"].full_name
PULL, PUSH = f"/{SERVICE}/Pull", f"/{SERVICE}/Push"

Message = TypeVar("Message", pb.TensorChunk, pb.UpdateChunk)
Header = TypeVar("Header", pb.ModelHeader, pb.UpdateHeader)

# The largest integer up to which doubles are exact. A negative number from a client in another language is far above.
MAX_EXAMPLES = 2**53
# Larger encoded payloads are decoded in a thread; for smaller ones the switch costs more than it saves. Bytes.
_DECODED_AT_ONCE = 1 << 15
# The tag of field 2 (data) of both messages, with wire type 2 (length-delimited).
_DATA_TAG = 0x12


@dataclass(frozen=True)
class Frame(Generic[Header]):
    """Content of one message of a stream."""

    header: Header | None
    data: Data
    checksum: str | None
    """Checksum in the trailer, in the last message."""


@dataclass(frozen=True)
class FirstFrame:
    """The content of the first message of a Push, which has the header."""

    header: pb.UpdateHeader
    data: Data
    checksum: str | None
    """Content of the trailer, if the update is a single message."""


def model_messages(header: pb.ModelHeader, data: Iterable[Data], checksum: str) -> Iterator[tuple[bytes, int]]:
    """Yield the serialized messages of a Pull, each with its number of data bytes."""
    return _framed(pb.TensorChunk, pb.TensorChunk(header=header), data, checksum)


def update_messages(header: pb.UpdateHeader, data: Iterable[Data], checksum: str = "") -> Iterator[bytes]:
    """Return the serialized messages of a Push. Without a checksum it is computed from the data."""
    return (message for message, _ in _framed(pb.UpdateChunk, pb.UpdateChunk(header=header), data, checksum))


def model_message(header: pb.ModelHeader | None, data: Data, checksum: str) -> bytes:
    """Serialize one message of a Pull: the first has the header, the last has the checksum, and each may have data."""
    head = pb.TensorChunk(header=header).SerializeToString() if header is not None else b""
    trailer = pb.TensorChunk(trailer=pb.Trailer(checksum=checksum)).SerializeToString() if checksum else b""
    return b"".join((head, *_data_field(data), trailer))


def _framed(kind: type[Message], first: Message, data: Iterable[Data], checksum: str) -> Iterator[tuple[bytes, int]]:
    head = first.SerializeToString()
    pending: Data = b""
    digest = xxhash.xxh3_128()
    for chunk in data:
        if not checksum:
            digest.update(chunk)
        if pending and head:
            yield head, 0
            head = b""
        if pending:
            yield b"".join(_data_field(pending)), len(pending)
        pending = chunk
    trailer = kind(trailer=pb.Trailer(checksum=checksum or digest.hexdigest())).SerializeToString()
    yield b"".join((head, *_data_field(pending), trailer)), len(pending)


def _data_field(data: Data) -> tuple[Data, ...]:
    """Encode the data field of a message. Encoded fields can be concatenated to a message."""
    return (bytes([_DATA_TAG]), _varint(len(data)), data) if data else ()


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def model_frame(message: bytes) -> Frame[pb.ModelHeader]:
    """Parse one message of a Pull. Raises :class:`TransferError`."""
    if (data := _data_alone(message)) is not None:
        return Frame(None, data, None)
    chunk = _parsed(pb.TensorChunk, message)
    return Frame(chunk.header if chunk.HasField("header") else None, chunk.data, _checksum(chunk))


def update_frame(message: bytes) -> Frame[pb.UpdateHeader]:
    """Parse one message of a Push. Raises :class:`TransferError`."""
    if (data := _data_alone(message)) is not None:
        return Frame(None, data, None)
    chunk = _parsed(pb.UpdateChunk, message)
    return Frame(chunk.header if chunk.HasField("header") else None, chunk.data, _checksum(chunk))


def first_update_frame(message: bytes) -> FirstFrame:
    """Parse the first message of a Push. Raise :class:`TransferError` if it has no header."""
    frame = update_frame(message)
    if frame.header is None:
        raise TransferError("the first message must be a header")
    return FirstFrame(frame.header, frame.data, frame.checksum)


def _data_alone(message: bytes) -> memoryview | None:
    """Return the data of a message that holds nothing else, without a copy, or ``None``."""
    if not message or message[0] != _DATA_TAG:
        return None
    length = 0
    for place, byte in enumerate(message[1:6]):
        length |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            start = place + 2
            return memoryview(message)[start:] if length == len(message) - start else None
    return None


def _parsed(kind: type[Message], message: bytes) -> Message:
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise TransferError(f"a message cannot be parsed ({error})") from None


def _checksum(chunk: pb.TensorChunk | pb.UpdateChunk) -> str | None:
    return chunk.trailer.checksum if chunk.HasField("trailer") else None


def receive_model(messages: Iterable[bytes], reception_of: Callable[[pb.ModelHeader], RawDecoder | Decoder]) -> State:
    """Receive the tensors of a Pull. Raises :class:`TransferError`.

    ``reception_of`` makes the receiver for a header.
    """
    reception: RawDecoder | Decoder | None = None
    rest = iter(messages)
    for message in rest:
        frame = model_frame(message)
        if reception is None:
            if frame.header is None:
                raise TransferError("the stream has no header")
            reception = reception_of(frame.header)
        if frame.data:
            reception.write(frame.data)
        if frame.checksum is not None:
            tensors = reception.finish(frame.checksum)
            # A call that is read to its end is over; otherwise it would have to be cancelled.
            if next(rest, None) is not None:
                raise TransferError("data after the trailer")
            return tensors
    raise TruncatedError("the model's stream ended early")


async def receive_update(
    first: FirstFrame,
    rest: AsyncIterator[bytes],
    reception: RawDecoder | Decoder,
    check: Callable[[], None] = lambda: None,
) -> tuple[State, int]:
    """Receive the tensors of a Push, given its first message; return them and their size on the wire in bytes.

    ``check`` is called for every message, and may raise. Raises :class:`TransferError`.
    """
    frame: FirstFrame | Frame[pb.UpdateHeader] = first
    while True:
        check()
        if frame is not first and frame.header is not None:
            raise TransferError("a second header")
        if frame.data:
            if isinstance(reception, Decoder) and len(frame.data) > _DECODED_AT_ONCE:
                await asyncio.to_thread(reception.write, frame.data)
            else:
                reception.write(frame.data)
        if frame.checksum is not None:
            tensors = reception.finish(frame.checksum)
            if await anext(rest, None) is not None:
                raise TransferError("data after the trailer")
            return tensors, reception.received
        message = await anext(rest, None)
        if message is None:
            raise TruncatedError(f"the stream ended early, after {reception.received} bytes")
        frame = update_frame(message)
