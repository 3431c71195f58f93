"""Streams of tensors as messages: a header, data, and the trailer with the last of them.

A small model is one message, which is what a round of it costs. Of a large one nearly all messages hold data alone:
these are made and read here, byte by byte as protobuf would, since its own objects copy the data twice on either side.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import xxhash
from google.protobuf.message import DecodeError

from isthmus_contracts.pb import federation_pb2 as pb

from .codecs import Decoder
from .tensors import Data, Reception, State, TransferError, TruncatedError

# The calls whose messages this module makes and reads itself, for what protobuf's generated stubs have in their place.
SERVICE = pb.DESCRIPTOR.services_by_name["Federation"].full_name
PULL, PUSH = f"/{SERVICE}/Pull", f"/{SERVICE}/Push"

Message = TypeVar("Message", pb.TensorChunk, pb.UpdateChunk)
Header = TypeVar("Header", pb.ModelHeader, pb.UpdateHeader)

# Floats count exactly up to here. A negative number of a client in another language arrives as one far above.
MOST_EXAMPLES = 2**53
# More encoded bytes than this are decoded in a thread, fewer are not worth its errand.
_DECODED_AT_ONCE = 1 << 15
# Field 2 of either message, data, with its length before it.
_DATA_TAG = 0x12


@dataclass(frozen=True)
class Frame(Generic[Header]):
    """What one message of a stream holds."""

    header: Header | None
    data: Data
    checksum: str | None
    """The trailer's."""


def model_messages(header: pb.ModelHeader, data: Iterable[Data], checksum: str) -> Iterator[tuple[bytes, int]]:
    """The messages of a Pull, serialized, and how many bytes of data are in each."""
    return _framed(pb.TensorChunk, pb.TensorChunk(header=header), data, checksum)


def update_messages(header: pb.UpdateHeader, data: Iterable[Data], checksum: str = "") -> Iterator[bytes]:
    """The messages of a Push, serialized. A checksum that is not given is taken of the data as they go by."""
    return (message for message, _ in _framed(pb.UpdateChunk, pb.UpdateChunk(header=header), data, checksum))


def model_message(header: pb.ModelHeader | None, data: Data, checksum: str) -> bytes:
    """One message of a Pull, serialized: the first has the header, the last has the checksum, each may have data."""
    head = pb.TensorChunk(header=header).SerializeToString() if header is not None else b""
    trailer = pb.TensorChunk(trailer=pb.Trailer(checksum=checksum)).SerializeToString() if checksum else b""
    return b"".join((head, *_data_field(data), trailer))


def _framed(kind: type[Message], first: Message, data: Iterable[Data], checksum: str) -> Iterator[tuple[bytes, int]]:
    head = first.SerializeToString()
    held: Data = b""
    digest = xxhash.xxh3_128()
    for chunk in data:
        if not checksum:
            digest.update(chunk)
        if held and head:
            yield head, 0
            head = b""
        if held:
            yield b"".join(_data_field(held)), len(held)
        held = chunk
    trailer = kind(trailer=pb.Trailer(checksum=checksum or digest.hexdigest())).SerializeToString()
    yield b"".join((head, *_data_field(held), trailer)), len(held)


def _data_field(data: Data) -> tuple[Data, ...]:
    """The field of a message; fields follow each other, so that messages may be joined from parts."""
    return (bytes([_DATA_TAG]), _varint(len(data)), data) if data else ()


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def model_frame(message: bytes) -> Frame[pb.ModelHeader]:
    """One message of a Pull. Raises :class:`TransferError`."""
    if (data := _data_alone(message)) is not None:
        return Frame(None, data, None)
    chunk = _parsed(pb.TensorChunk, message)
    return Frame(chunk.header if chunk.HasField("header") else None, chunk.data, _checksum(chunk))


def update_frame(message: bytes) -> Frame[pb.UpdateHeader]:
    """One message of a Push. Raises :class:`TransferError`."""
    if (data := _data_alone(message)) is not None:
        return Frame(None, data, None)
    chunk = _parsed(pb.UpdateChunk, message)
    return Frame(chunk.header if chunk.HasField("header") else None, chunk.data, _checksum(chunk))


def _data_alone(message: bytes) -> memoryview | None:
    """The data of a message that holds nothing else; they are not copied."""
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
        raise TransferError(f"a message that cannot be read ({error})") from None


def _checksum(chunk: pb.TensorChunk | pb.UpdateChunk) -> str | None:
    return chunk.trailer.checksum if chunk.HasField("trailer") else None


def receive_model(messages: Iterable[bytes], reception_of: Callable[[pb.ModelHeader], Reception | Decoder]) -> State:
    """The tensors of a Pull. Raises :class:`TransferError`."""
    reception: Reception | Decoder | None = None
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
            # Read to its end a call is over; left there it would have to be cancelled.
            if next(rest, None) is not None:
                raise TransferError("data after the trailer")
            return tensors
    raise TruncatedError("the model's stream ended early")


async def receive_update(
    first: Frame[pb.UpdateHeader],
    rest: AsyncIterator[bytes],
    reception: Reception | Decoder,
    check: Callable[[], None] = lambda: None,
) -> tuple[State, int]:
    """The tensors of a Push and their bytes on the wire, given its first message. Raises :class:`TransferError`.

    ``check`` is called with every message, and may raise.
    """
    frame = first
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
