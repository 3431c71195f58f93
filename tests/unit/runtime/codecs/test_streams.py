"""Whole state dicts with every chain, and malicious streams."""

import tracemalloc

import pytest
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.aggregator.updates.validation import Fault, Reason, fault_of
from isthmus.codecs import Chain, CodecError, Decoder, Encoded, NonFiniteError, Residual, encode, parse_chain
from isthmus.codecs.base import RAW_BELOW, SEGMENT
from isthmus.codecs.zstd import BLOCK_BYTES
from isthmus.tensors import CHUNK_BYTES, State, TransferError, non_finite
from isthmus_contracts.api.compression import Compression

CHAINS = [
    "Float16", "BFloat16", "Delta+Float16", "Int8", "Int4", "Rotation+Int8", "Rotation+Int4", "TopK", "TopK+Int8",
    "TopK+BFloat16", "Zstd", "Int8+Zstd", "TopK+Int4+Zstd",
]  # fmt: skip
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
SEED = "job/3/pool/0"


def chain(name: str, fraction: str = "0.1") -> Chain:
    return parse_chain(Compression(upload=name, top_k_fraction=fraction).upload_codecs)


def decoded(encoded: Encoded, base: State | None = None, cut: int = CHUNK_BYTES) -> State:
    decoder = Decoder(encoded.specs, encoded.chain, SEED, base)
    data = b"".join(encoded.chunks)
    for start in range(0, len(data), cut):
        decoder.write(data[start : start + cut])
    assert decoder.received == encoded.size
    return decoder.finish(encoded.checksum)


def forged(encoded: Encoded, data: bytes) -> Encoded:
    """Return other data with a matching checksum."""
    return Encoded(encoded.chain, encoded.specs, [data], xxhash.xxh3_128_hexdigest(data))


@given(
    st.sampled_from(CHAINS),
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 30), max_size=3)), max_size=5),
    st.integers(1, 5000),
    st.integers(0, 2**31),
)
@settings(max_examples=120)
def test_any_state_survives_any_chain_and_cut(
    name: str, shapes: list[tuple[torch.dtype, list[int]]], cut: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = {
        f"t{number}": torch.randn(shape, generator=generator).to(dtype) for number, (dtype, shape) in enumerate(shapes)
    }
    state = {
        key: (tensor + torch.randn(tensor.shape, generator=generator) * 0.1).to(tensor.dtype)
        if tensor.is_floating_point() else torch.ones_like(tensor)
        for key, tensor in base.items()
    }  # fmt: skip
    encoded = encode(state, chain(name), SEED, base)
    assert encode(state, chain(name), SEED, base).chunks == encoded.chunks
    result = decoded(encoded, base, cut)
    assert list(result) == list(state)
    for key, tensor in state.items():
        assert (result[key].dtype, result[key].shape) == (tensor.dtype, tensor.shape)
        if not tensor.is_floating_point() or tensor.numel() < RAW_BELOW:
            assert torch.equal(result[key], tensor)
        elif tensor.numel():
            assert torch.isfinite(result[key]).all()
            if "TopK" not in name:
                allowed = {"Int4": 0.8, "Rotation+Int4": 0.8}.get(name.removesuffix("+Zstd"), 0.08)
                assert (result[key] - tensor).abs().max() <= allowed


@pytest.mark.parametrize("name", CHAINS)
def test_more_than_one_segment(name: str) -> None:
    count = 2 * SEGMENT + 1000
    base = {"w": torch.randn(count), "n": torch.tensor(3), "b": torch.randn(10)}
    state = {"w": base["w"] + 0.01 * torch.randn(count), "n": torch.tensor(4), "b": torch.randn(10)}
    encoded = encode(state, chain(name), SEED, base)
    assert all(len(chunk) <= CHUNK_BYTES + 4100 for chunk in encoded.chunks)
    result = decoded(encoded, base, 77_777)
    assert torch.equal(result["b"], state["b"])
    assert result["n"].item() == 4
    if not chain(name).zstd:
        assert encoded.size == pytest.approx(chain(name).bytes_per_parameter * count, rel=0.02)
    expected = {"TopK": 1.0, "Int4": 0.4}.get(next((word for word in ("TopK", "Int4") if word in name), ""), 0.4)
    change = (state["w"] - base["w"]).norm()
    assert (result["w"] - state["w"]).norm() <= expected * change


def test_zstd_alone_changes_nothing() -> None:
    state = {"w": torch.randn(1000, 700), "h": torch.randn(300).half(), "z": torch.zeros(500_000)}
    encoded = encode(state, chain("Zstd"), SEED)
    assert encoded.size < sum(tensor.nbytes for tensor in state.values())
    for key, tensor in decoded(encoded).items():
        assert torch.equal(tensor, state[key])


def test_error_feedback_makes_up_for_what_was_left_out() -> None:
    """Karimireddy et al. 2019: the values sent so far plus the residual equal all changes so far."""
    codecs, base = chain("TopK+Int8", "0.05"), {"w": torch.zeros(20_000)}
    residual, sent, total = None, torch.zeros(20_000), torch.zeros(20_000)
    for number in range(30):
        change = torch.randn(20_000, generator=torch.Generator().manual_seed(number))
        encoded = encode({"w": change}, codecs, SEED, base, residual)
        sent += decoded(encoded, base)["w"]
        total += change
        residual = encoded.residual
        assert residual is not None
        kept = residual.read("w", (20_000,), 0, 20_000)
        assert kept is not None
        # Each round rounds the residual to 16 bits: half a step of the largest value's in a block.
        torch.testing.assert_close(sent + kept, total, rtol=0, atol=(number + 1) * 0.5 * 12 / 32767)
    # The residual stays bounded (lemma 3 of the paper) instead of growing with every round.
    assert kept.norm() < total.norm() * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["TopK", "TopK+Int8", "TopK+Float16"])
def test_error_feedback_makes_up_for_what_half_precision_rounds_away(name: str, dtype: torch.dtype) -> None:
    """The model's movement so far plus the residual equals all changes so far, also below the weights' ulp."""
    count, rounds = 1000, 40
    generator = torch.Generator().manual_seed(0)
    start = {"w": torch.randn(count, generator=generator).to(dtype)}
    model, residual = start, None
    total = torch.zeros(count, dtype=torch.float64)
    for number in range(rounds):
        trained = (model["w"].float() + 0.02 * torch.randn(count, generator=generator)).to(dtype)
        total += trained.double() - model["w"].double()
        encoded = encode({"w": trained}, chain(name), SEED, model, residual)
        model, residual = decoded(encoded, model), encoded.residual
        assert residual is not None
        kept = residual.read("w", (count,), 0, count)
        assert kept is not None
        moved = model["w"].double() - start["w"].double()
        torch.testing.assert_close(moved + kept, total, rtol=0, atol=(number + 1) * 0.5 / 32767)


def test_what_half_precision_would_round_away_takes_no_place() -> None:
    base = {"w": torch.cat((torch.full((700,), 100.0), torch.full((300,), 0.01))).to(torch.bfloat16)}
    waiting = Residual()
    waiting.begin("w", (1000,))
    waiting.write("w", 0, torch.cat((torch.full((700,), 0.1), torch.full((300,), 0.01))))  # the ulp of 100 is 0.5
    encoded = encode(base, chain("TopK", "0.3"), SEED, base, waiting)
    moved = decoded(encoded, base)["w"].float() - base["w"].float()
    torch.testing.assert_close(moved[700:], torch.full((300,), 0.01), rtol=0.01, atol=0)
    assert not moved[:700].any()
    assert encoded.residual is not None
    kept = encoded.residual.read("w", (1000,), 0, 700)
    torch.testing.assert_close(kept, torch.full((700,), 0.1), rtol=1e-3, atol=0)


def test_a_base_that_is_not_kept_goes_as_its_tensors_are_encoded() -> None:
    base = {"w": torch.randn(1000), "v": torch.randn(500)}
    state = {name: tensor + torch.randn(len(tensor)) for name, tensor in base.items()}
    kept = encode(state, chain("TopK"), SEED, base)
    assert set(base) == {"w", "v"}
    encoded = encode(state, chain("TopK"), SEED, base, keep_base=False)
    assert base == {}
    assert encoded.chunks == kept.chunks
    assert kept.residual is not None and encoded.residual is not None
    for name, tensor in kept.residual.tensors.items():
        assert torch.equal(encoded.residual.tensors[name], tensor)


STATE = {"w": torch.randn(70_000)}
BASE = {"w": torch.zeros(70_000)}


@pytest.mark.parametrize("name", ["Int8", "TopK", "Zstd", "Int4+Zstd"])
def test_a_cut_stream(name: str) -> None:
    encoded = encode(STATE, chain(name), SEED, BASE)
    data = b"".join(encoded.chunks)
    for length in (0, 3, len(data) // 2, len(data) - 1):
        with pytest.raises(TransferError, match="ended early"):
            decoded(forged(encoded, data[:length]), BASE)


@pytest.mark.parametrize("name", ["Int8", "Float16", "TopK"])
def test_more_than_announced(name: str) -> None:
    encoded = encode(STATE, chain(name), SEED, BASE)
    with pytest.raises(TransferError, match="more data than the header announced"):
        decoded(forged(encoded, b"".join(encoded.chunks) + b"\0"), BASE)


def test_a_flipped_bit() -> None:
    encoded = encode(STATE, chain("Int8"), SEED, BASE)
    data = bytearray(b"".join(encoded.chunks))
    data[-1] ^= 1
    encoded.chunks = [bytes(data)]
    with pytest.raises(TransferError, match="checksum"):
        decoded(encoded, BASE)


@pytest.mark.parametrize("name", ["Int8", "Int4", "Rotation+Int8"])
@pytest.mark.parametrize(
    ("scale", "problem"),
    [(float("nan"), "NaN or infinity"), (float("inf"), "NaN or infinity"), (-1.0, "negative scale")],
)
def test_bad_scales(name: str, scale: float, problem: str) -> None:
    encoded = encode(STATE, chain(name), SEED, BASE)
    data = bytearray(b"".join(encoded.chunks))
    data[:4] = torch.tensor([scale]).numpy().tobytes()
    with pytest.raises(CodecError, match=f"^w holds .*{problem}") as caught:
        decoded(forged(encoded, bytes(data)), BASE)
    reason = Reason.CODEC if scale < 0 else Reason.NON_FINITE
    assert fault_of(caught.value) == Fault(reason, str(caught.value))


@pytest.mark.parametrize("name", [name for name in CHAINS if "Rotation" not in name])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_travels_and_is_seen_by_the_receiver(name: str, bad: float) -> None:
    state = {"w": STATE["w"].clone()}
    state["w"][SEGMENT + 17] = bad
    encoded = encode(state, chain(name), SEED, BASE)
    try:
        assert non_finite(decoded(encoded, BASE)) == "w"
    except NonFiniteError as error:
        assert str(error).startswith("w holds NaN or infinity")


@pytest.mark.parametrize("positions", [(5, 5), (6, 5), (0xFFFF, 0xFFFF)])
def test_bad_positions(positions: tuple[int, int]) -> None:
    encoded = encode({"w": torch.randn(1000)}, chain("TopK"), SEED, {"w": torch.zeros(1000)})
    data = bytearray(encoded.chunks[0])
    data[:4] = b"".join(position.to_bytes(2, "little") for position in positions)
    with pytest.raises(CodecError, match="positions that are not ascending"):
        decoded(forged(encoded, bytes(data)))


def test_a_position_outside() -> None:
    encoded = encode({"w": torch.randn(1000)}, chain("TopK"), SEED, {"w": torch.zeros(1000)})
    data = bytearray(encoded.chunks[0])
    data[198:200] = (1000).to_bytes(2, "little")  # the last of a hundred positions
    with pytest.raises(CodecError, match="are out of range"):
        decoded(forged(encoded, bytes(data)))


def test_a_size_that_the_chain_does_not_make() -> None:
    encoded = encode(STATE, chain("Int8"), SEED, BASE)
    encoded.specs[0].size += 1
    with pytest.raises(CodecError, match="bytes announced, but Delta"):
        Decoder(encoded.specs, encoded.chain, SEED, BASE)


def bomb(size: int) -> bytes:
    frame = zstandard.ZstdCompressor(level=1).compress(bytes(size))
    return len(frame).to_bytes(4, "little") + frame


def without_size() -> bytes:
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=False)
    frame = compressor.compress(bytes(BLOCK_BYTES * 50))
    return len(frame).to_bytes(4, "little") + frame


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (bomb(BLOCK_BYTES * 200), "would unpack to more than is allowed"),
        (without_size(), "would unpack to more than is allowed"),
        (b"\xff\xff\xff\xff" + bytes(100), "a Zstd block of 4294967295 bytes"),
        (b"\0\0\0\0", "a Zstd block of 0 bytes"),
        (bomb(0), "a Zstd block without content"),
        ((8).to_bytes(4, "little") + b"no frame", "a damaged Zstd block"),
        ((9).to_bytes(4, "little") + zstandard.ZstdCompressor().compress(b"a" * 50)[:9], "a damaged Zstd block"),
    ],
    ids=["bomb", "no size", "huge", "empty", "no content", "garbage", "truncated frame"],
)
def test_hostile_zstd(data: bytes, problem: str) -> None:
    encoded = encode(STATE, chain("Int8+Zstd"), SEED, BASE)
    tracemalloc.start()
    with pytest.raises(CodecError, match=problem):
        decoded(forged(encoded, data), BASE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * BLOCK_BYTES


def test_many_small_bombs_end_where_the_header_ends() -> None:
    encoded = encode(STATE, chain("Zstd"), SEED)
    decoder = Decoder(encoded.specs, encoded.chain, SEED)
    block = bomb(BLOCK_BYTES)
    with pytest.raises(TransferError, match="more data than the header announced"):
        for _ in range(10):
            decoder.write(block * 10)


@pytest.mark.parametrize(
    "names",
    [
        ["Zip"],
        ["Int8", "Int4"],
        ["Zstd", "Int8"],
        ["Delta"],
        ["TopK"],
        ["TopK=2"],
        ["TopK=x"],
        ["Rotation"],
        ["Int8", "TopK=0.1"],
    ],
)
def test_no_chains(names: list[str]) -> None:
    with pytest.raises(CodecError):
        parse_chain(names)


def test_a_value_that_is_not_a_tensor_is_refused() -> None:
    with pytest.raises(TransferError, match="step is a int, not a tensor"):
        encode({"step": 3}, chain("Int8"), SEED)  # type: ignore[dict-item]
