"""Round trips of tensors through streams, and rejection of damaged streams."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.tensors import (
    CHUNK_BYTES,
    RawDecoder,
    State,
    TransferError,
    checksum_of,
    chunk_bytes,
    chunks_of,
    mismatch,
    non_finite,
    sha256_of,
    snapshot,
    specs_of,
)

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def received(state: State, cut: int = CHUNK_BYTES) -> State:
    reception = RawDecoder(specs_of(state))
    for chunk in chunks_of(state):
        for start in range(0, len(chunk), cut):
            reception.write(chunk[start : start + cut])
    return reception.finish(checksum_of(state))


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)), max_size=6),
    st.integers(1, 64),
)
@settings(max_examples=60)
def test_any_state_survives_any_cut(shapes: list[tuple[torch.dtype, list[int]]], cut: int) -> None:
    state = {
        f"layer.{number}": torch.randint(0, 2, shape).to(dtype) if dtype != torch.float32 else torch.randn(shape)
        for number, (dtype, shape) in enumerate(shapes)
    }
    result = received(state, cut)
    assert list(result) == list(state)
    for name, tensor in state.items():
        assert result[name].dtype == tensor.dtype
        assert torch.equal(result[name], tensor)


@pytest.mark.parametrize("clients", [1, 16, 64, 1000])
def test_large_and_small_tensors_share_full_chunks(clients: int) -> None:
    state = {"a": torch.randn(10), "b": torch.randn(700_000), "c": torch.randn(3)}
    size = chunk_bytes(clients)
    chunks = list(chunks_of(state, size))
    assert [len(chunk) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
    assert b"".join(chunks) == b"".join(chunks_of(state))
    assert torch.equal(received(state)["b"], state["b"])


def test_the_more_clients_the_smaller_the_chunks() -> None:
    sizes = [chunk_bytes(clients) >> 10 for clients in (0, 1, 16, 64, 256, 1000)]
    assert sizes == [1024, 1024, 1024, 256, 64, 64]


def test_a_snapshot_is_contiguous_and_independent() -> None:
    original = torch.arange(6.0).reshape(2, 3)
    copy = snapshot({"w": original.t()})["w"]
    original.zero_()
    assert copy.is_contiguous()
    assert copy.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_tied_weights_travel_under_both_names() -> None:
    shared = torch.randn(4)
    result = received(snapshot({"embed": shared, "head": shared}))
    assert torch.equal(result["embed"], shared)
    assert torch.equal(result["head"], shared)


def test_a_state_that_holds_no_tensor_is_refused() -> None:
    with pytest.raises(TransferError, match="step is a int, not a tensor"):
        snapshot({"step": 3})  # type: ignore[dict-item]


STATE = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([3])}


def test_truncated() -> None:
    reception = RawDecoder(specs_of(STATE))
    reception.write(next(chunks_of(STATE))[:-1])
    with pytest.raises(TransferError, match="ended early, after 15 bytes"):
        reception.finish(checksum_of(STATE))


def test_too_much() -> None:
    reception = RawDecoder(specs_of(STATE))
    with pytest.raises(TransferError, match="more data than the header announced"):
        reception.write(bytes(next(chunks_of(STATE))) + b"\0")


def test_one_flipped_bit() -> None:
    data = bytearray(next(chunks_of(STATE)))
    data[3] ^= 1
    reception = RawDecoder(specs_of(STATE))
    reception.write(bytes(data))
    with pytest.raises(TransferError, match="checksum"):
        reception.finish(checksum_of(STATE))


def test_specs_that_lie_about_their_size() -> None:
    spec = specs_of(STATE)[0]
    spec.size = 1 << 40
    with pytest.raises(TransferError, match="do not fit F32 of shape"):
        RawDecoder([spec])


@pytest.mark.parametrize(
    ("offered", "problem"),
    [
        ({"w": torch.zeros(2)}, "tensors are missing: b"),
        ({**STATE, "x": torch.zeros(1)}, "unknown tensors: x"),
        ({**STATE, "w": torch.zeros(3)}, r"w has shape [3], but the model's has [2]"),
        ({**STATE, "w": torch.zeros(2, dtype=torch.float64)}, "w is F64, but the model's is F32"),
        (STATE, None),
        (dict(reversed(STATE.items())), None),
    ],
)
def test_mismatch_names_the_difference(offered: State, problem: str | None) -> None:
    found = mismatch(specs_of(STATE), specs_of(offered))
    assert (found and found.message) == problem


def test_non_finite_names_the_tensor() -> None:
    assert non_finite(STATE) is None
    assert non_finite({**STATE, "v": torch.tensor([1.0, float("nan")])}) == "v"
    assert non_finite({**STATE, "v": torch.tensor([float("-inf")])}) == "v"


def test_memory_that_fits_is_used_again() -> None:
    room = {name: torch.empty_like(tensor) for name, tensor in STATE.items()}
    copy = snapshot(STATE, room)
    assert all(copy[name] is room[name] and torch.equal(copy[name], tensor) for name, tensor in STATE.items())
    other = {name: torch.empty(7, dtype=torch.float16) for name in STATE}
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in snapshot(STATE, other).items())


def test_the_sha256_tells_any_two_models_apart() -> None:
    plain = {"a": torch.arange(6, dtype=torch.float32), "b": torch.zeros(2, dtype=torch.bool)}
    others = [
        {**plain, "a": plain["a"].reshape(2, 3)},
        {**plain, "a": plain["a"].view(torch.int32)},
        {**plain, "a": torch.arange(6, dtype=torch.float32) * (1 + 2**-23)},
        {"a": plain["a"]},
        {"a": plain["a"], "c": plain["b"]},
        {"ab": plain["a"], "b": plain["b"]},
        {},
    ]
    digests = {sha256_of(state) for state in (plain, *others)}
    assert len(digests) == 1 + len(others)
    assert sha256_of({"b": plain["b"], "a": plain["a"]}) == sha256_of(plain)
