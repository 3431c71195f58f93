"""Messages of a stream: the encoding made here equals protobuf's."""

import pytest
import torch

from isthmus.framing import model_frame, model_messages, receive_model, update_frame, update_messages
from isthmus.tensors import RawDecoder, State, TransferError, checksum_of, chunks_of, specs_of
from isthmus_contracts.pb import federation_pb2 as pb

SMALL: State = {"w": torch.arange(5.0), "flag": torch.tensor(True)}
LARGE: State = {"a": torch.arange(700_000.0), "b": torch.arange(3), "c": torch.arange(600_000.0)}


@pytest.mark.parametrize("state", [SMALL, LARGE, {}], ids=["small", "large", "empty"])
def test_a_model_arrives_as_it_was_sent(state: State) -> None:
    header = pb.ModelHeader(round=3, digest="d", tensors=specs_of(state))
    messages = list(model_messages(header, chunks_of(state), checksum_of(state)))
    assert sum(size for _, size in messages) == sum(tensor.nbytes for tensor in state.values())
    received = receive_model([message for message, _ in messages], lambda header: RawDecoder(header.tensors))
    assert list(received) == list(state)
    assert all(torch.equal(received[name], tensor) for name, tensor in state.items())


def test_protobuf_reads_what_is_made_by_hand() -> None:
    header = pb.UpdateHeader(round=3, tensors=specs_of(LARGE))
    chunks = [pb.UpdateChunk.FromString(message) for message in update_messages(header, chunks_of(LARGE), "sum")]
    assert [chunk.HasField("header") for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [chunk.HasField("trailer") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[0].header == header
    assert chunks[-1].trailer.checksum == "sum"
    *_, last = update_messages(header, chunks_of(LARGE))
    assert pb.UpdateChunk.FromString(last).trailer.checksum == checksum_of(LARGE)
    assert b"".join(chunk.data for chunk in chunks) == b"".join(map(bytes, chunks_of(LARGE)))


@pytest.mark.parametrize("size", [1, 127, 128, 1 << 20])
def test_what_protobuf_makes_is_read_by_hand(size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    data = data[:size]
    frame = update_frame(pb.UpdateChunk(data=data).SerializeToString())
    assert isinstance(frame.data, memoryview), "not copied"
    assert (frame.header, bytes(frame.data), frame.checksum) == (None, data, None)
    whole = pb.TensorChunk(data=data, trailer=pb.Trailer(checksum="sum"))
    last = model_frame(whole.SerializeToString())
    assert (last.header, bytes(last.data), last.checksum) == (None, data, "sum")


@pytest.mark.parametrize("message", [b"\x12", b"\x12\x05abc", b"\x12\xff\xff\xff\xff\xff\xff", b"\xff\xff"])
def test_what_cannot_be_read_is_refused(message: bytes) -> None:
    with pytest.raises(TransferError, match="cannot be parsed"):
        update_frame(message)
