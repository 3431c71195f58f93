"""Properties of every upload chain, for tensors of all floating-point types, magnitudes and shapes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.codecs import Chain, Decoder, Encoded, encode, parse_chain
from isthmus.codecs.base import SEGMENT
from isthmus.tensors import State, bytes_view
from isthmus_contracts.api.compression import Compression

KINDS = [
    "Float16", "BFloat16", "Int8", "Int4", "Rotation+Int8", "Rotation+Int4", "TopK", "TopK+Float16", "TopK+BFloat16",
    "TopK+Int8", "TopK+Int4",
]  # fmt: skip
SHAPES = [(), (0,), (1,), (255,), (256,), (257,), (33, 31), (1024,), (1025,), (SEGMENT,), (SEGMENT + 1,), (5, 256)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
EPSILON = {torch.float64: 2.3e-16, torch.float32: 2.4e-7, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SEED = "7/pool/0"


def draw(number: int, exponent: int) -> tuple[State, State]:
    """Generate a base and trained weights: changes are normal, heavy-tailed, zero, constant, or a single one."""
    random = np.random.default_rng(number)
    base, state = State(), State()
    for place in range(3):
        dtype, shape = FLOATS[random.integers(4)], SHAPES[random.integers(len(SHAPES))]
        scale = 10.0 ** (max(-3, min(exponent, 2)) if dtype == torch.float16 else exponent)
        change = np.array(random.standard_normal(shape))
        match random.integers(5):
            case 1:
                change = change**7 / 100
            case 2:
                change = change * 0
            case 3:
                change = np.full(shape, 0.7)
            case 4:
                change = change * 1e-6
                change.reshape(-1)[:1] = 1
        old = (torch.from_numpy(np.array(random.standard_normal(shape))) * scale).to(dtype)
        new = (old.double() + torch.from_numpy(np.asarray(change)) * scale * random.choice([1, 0.01])).to(dtype)
        if new.dim() == 2 and random.integers(2):
            new = new.t().contiguous().t()
        base[f"t{place}"], state[f"t{place}"] = old, new
    base |= {"n": torch.tensor([0, 0]), "mask": torch.zeros(300, dtype=torch.bool)}
    return base, state | {"n": torch.tensor([2**63 - 1, -5]), "mask": torch.rand(300) < 0.5}


def decoded(encoded: Encoded, base: State, cut: int) -> State:
    decoder, data = Decoder(encoded.specs, encoded.chain, SEED, base), b"".join(encoded.chunks)
    for start in range(0, len(data), cut):
        decoder.write(data[start : start + cut])
    return decoder.finish(encoded.checksum)


def data(state: State) -> list[bytes]:
    return [bytes(bytes_view(tensor.contiguous())) for tensor in state.values()]


def largest(values: torch.Tensor, block: int) -> torch.Tensor:
    """Return for each value the largest magnitude in its block; every segment starts a new block."""
    found = []
    for segment in values.split(SEGMENT):
        padded = torch.nn.functional.pad(segment, (0, -len(segment) % block)).view(-1, block)
        found.append(padded.abs().amax(1, keepdim=True).expand_as(padded).reshape(-1)[: len(segment)])
    return torch.cat(found)


def bound(kind: str, change: torch.Tensor) -> torch.Tensor | None:
    """Return the error bound of each value, as in docs/training/compression.md."""
    match kind:
        case "Float16":
            beyond = (change.abs() - 65504).clamp(min=0)  # which is clamped to the largest number
            return beyond + torch.maximum(change.abs() * 2.0**-11, torch.full_like(change, 2.0**-25))
        case "BFloat16":
            return change.abs() * 2.0**-8 + 1e-40
        case "Int8":
            return largest(change, 256) / 127 * (1 + 1e-4) + 1e-36
        case "Int4":
            return largest(change, 128) / 7 * (1 + 1e-4) + 1e-36
    return None


def check(
    kind: str, chain: Chain, encoded: Encoded, name: str, old: torch.Tensor, new: torch.Tensor, got: torch.Tensor
) -> None:
    """Check one tensor that went through the lossy codecs."""
    assert torch.isfinite(got).all()
    before, after = old.double().reshape(-1), new.double().reshape(-1)
    change, moved = after - before, got.double().reshape(-1) - before
    # Rounding of the dtype, of differences in single precision, and of float16's subnormal numbers.
    own = torch.maximum(before.abs(), after.abs()) * EPSILON[new.dtype] + change.abs() * 3e-7
    own += 1.2e-7 if new.dtype == torch.float16 else 1e-40
    left = change - moved
    if torch.equal(before, after):
        assert not moved.any()
    if (limit := bound(kind, change)) is not None:
        assert (left.abs() <= limit + own).all()
    energy, lost = float(change.square().sum()), float(left.square().sum())
    slack = float(own.square().sum()) * 4
    if kind.startswith("Rotation"):
        levels = 127 if kind.endswith("8") else 7
        padded = -(-len(change) // 1024) * 1024
        assert lost <= energy * padded / levels**2 * 1.01 + slack + 1e-60
    if kind.startswith("TopK"):
        kept = sum(chain.codec.kept(len(segment)) for segment in change.split(SEGMENT))  # type: ignore[union-attr]
        assert lost <= (1 - kept / len(change) if kind == "TopK" else 1.7) * energy * (1 + 1e-5) + slack + 1e-60
        assert encoded.residual is not None
        residual = encoded.residual.read(name, new.shape, 0, new.numel())
        assert residual is not None
        assert ((residual.double() - left).abs() <= largest(left, 256) / 65534 * 1.001 + 2 * own + 1e-33).all()


@pytest.mark.parametrize("zstd", ["", "+Zstd"])
@pytest.mark.parametrize("kind", KINDS)
@given(
    number=st.integers(0, 10**6), exponent=st.sampled_from([0, 0, -4, -8, -20, -30, 4, 10]),
    fraction=st.sampled_from(["0.001", "0.01", "0.1", "0.5"]), cut=st.sampled_from([999, 70_001]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_the_bounds_of_every_chain(kind: str, zstd: str, number: int, exponent: int, fraction: str, cut: int) -> None:
    base, state = draw(number, exponent)
    chain = parse_chain(Compression(upload=kind + zstd, top_k_fraction=fraction).upload_codecs)
    given_data = data(state)
    encoded = encode(state, chain, SEED, base)
    assert encode(state, chain, SEED, base).chunks == encoded.chunks
    assert data(state) == given_data
    size = sum(chain.size(spec) for spec in encoded.specs)
    assert encoded.size <= size * 1.001 + 32 if chain.zstd else encoded.size == size
    received = decoded(encoded, base, cut)
    assert data(received) == data(decoded(encoded, base, 1 << 20))
    for spec in encoded.specs:
        new, got = state[spec.name], received[spec.name]
        assert (got.dtype, got.shape) == (new.dtype, new.shape)
        if chain.takes(spec):
            check(kind, chain, encoded, spec.name, base[spec.name], new, got)
        else:
            assert torch.equal(got, new)
