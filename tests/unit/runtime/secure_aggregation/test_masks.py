import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.secure_aggregation.primitives.masks import (
    SEGMENT_BYTES,
    MaskError,
    MasksCancelledError,
    add_masks,
    sizes_of,
)

from .mask_stream import Block, MaskStream, counter_mode

_DTYPES = [torch.int16, torch.int32, torch.int64]
_KEY = bytes(range(32))


def _zeros(*sizes: tuple[str, torch.dtype, int]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(elements, dtype=dtype) for name, dtype, elements in sizes}


def _random(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(np.frombuffer(bytearray(os.urandom(tensor.nbytes)), str(tensor.dtype)[6:]).copy())
        if tensor.numel() else tensor.clone()
        for name, tensor in state.items()
    }  # fmt: skip


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


_states = st.dictionaries(
    st.text("abcdef.", min_size=1, max_size=4),
    st.tuples(st.sampled_from(_DTYPES), st.sampled_from([0, 1, 3, 7, 1000, 262_144, 300_001])),
    min_size=1, max_size=6,
).map(lambda sizes: _zeros(*((name, *size) for name, size in sizes.items())))  # fmt: skip


def test_counter_mode_agrees_with_nist_sp_800_38a() -> None:
    """Appendix F.5.5."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    stream = counter_mode(key, bytes(range(0xF0, 0x100)), len(plain))
    assert bytes(a ^ b for a, b in zip(plain, stream, strict=True)).hex() == (
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )


def test_the_first_block_agrees_with_the_specification_of_gcm() -> None:
    """McGrew and Viega, "The Galois/Counter Mode of Operation (GCM)", test case 14."""
    state = _zeros(("a", torch.int32, 4))
    add_masks(state, [(bytes(32), 1)])
    assert state["a"].numpy().tobytes().hex() == "cea7403d4d606b6e074ec5d3baf39d18"


@given(_states, st.sampled_from([1, -1]), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_whole_masks_equal_those_made_by_seeking(state, sign, threads) -> None:
    whole, sought = _random(state), {}
    sought = {name: tensor.clone() for name, tensor in whole.items()}
    add_masks(whole, [(_KEY, sign)], threads)
    MaskStream(_KEY, sizes_of(state)).add_to(sought, sign)
    assert _equal(whole, sought)


@given(_states, st.data())
@settings(max_examples=25, deadline=None)
def test_any_block_can_be_masked_alone(state, data) -> None:
    whole = {name: tensor.clone() for name, tensor in state.items()}
    add_masks(whole, [(_KEY, 1)])
    name = data.draw(st.sampled_from(sorted(state)))
    start = data.draw(st.integers(0, len(whole[name])))
    stop = data.draw(st.integers(start, len(whole[name])))
    stream = MaskStream(_KEY, sizes_of(state))
    stream.add_to(state, 1, [Block(name, start, stop)])
    assert torch.equal(state[name][start:stop], whole[name][start:stop])
    assert not state[name][:start].any()
    assert not state[name][stop:].any()
    assert not any(tensor.any() for other, tensor in state.items() if other != name)


def test_blocks_in_any_order_make_the_whole_mask() -> None:
    elements = 3 * SEGMENT_BYTES // 4 + 5
    whole, pieces = (_zeros(("a", torch.int32, elements), ("b", torch.int64, 9)) for _ in range(2))
    add_masks(whole, [(_KEY, 1)])
    blocks = [Block("a", start, min(start + 1001, elements)) for start in range(0, elements, 1001)]
    MaskStream(_KEY, sizes_of(pieces)).add_to(pieces, 1, [*blocks[::-1], Block("b", 0, 9)])
    assert _equal(whole, pieces)


@given(_states, st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_masks_of_opposite_sign_cancel(state, keys, threads) -> None:
    values = _random(state)
    masked = {name: tensor.clone() for name, tensor in values.items()}
    signed = [(os.urandom(32), (-1) ** number) for number in range(keys)]
    add_masks(masked, signed, threads)
    assert all(not torch.equal(masked[name], values[name]) for name in values if values[name].numel() > 100)
    add_masks(masked, [(key, -sign) for key, sign in signed[::-1]])
    assert _equal(masked, values)


def test_the_sum_of_pairwise_masked_vectors_is_the_plain_sum() -> None:
    state = _zeros(("w", torch.int32, 200_000), ("isthmus.scalars", torch.int64, 3))
    values = [_random(state) for _ in range(4)]
    total = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    pairs = {(first, second): os.urandom(32) for first in range(4) for second in range(first + 1, 4)}
    seeds = [os.urandom(32) for _ in range(4)]
    for own in range(4):
        masked = {name: tensor.clone() for name, tensor in values[own].items()}
        signed = [(key, 1 if pair[0] == own else -1) for pair, key in pairs.items() if own in pair]
        add_masks(masked, [(seeds[own], 1), *signed])
        for name, tensor in masked.items():
            total[name] += tensor
    add_masks(total, [(seed, -1) for seed in seeds], threads=2)
    assert _equal(total, {name: sum(value[name] for value in values) for name in state})


@pytest.mark.parametrize("dtype", _DTYPES)
def test_sums_wrap_around(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    mask, high = torch.zeros(1000, dtype=dtype), torch.full((1000,), limits.max, dtype=dtype)
    add_masks({"a": mask}, [(_KEY, 1)])
    add_masks({"a": high}, [(_KEY, 1)])
    modulus = 2**limits.bits
    for before, after in zip(mask.tolist(), high.tolist(), strict=True):
        assert (after - before - limits.max) % modulus == 0
        assert limits.min <= after <= limits.max


@pytest.mark.parametrize("dtype", _DTYPES)
def test_every_byte_of_a_mask_is_uniform(dtype: torch.dtype) -> None:
    """A fixed key, so this never fails by chance."""
    elements = 1 << 18
    mask = torch.zeros(elements, dtype=dtype)
    add_masks({"a": mask}, [(_KEY, 1)])
    columns = mask.numpy().view(np.uint8).reshape(elements, mask.itemsize)
    expected = elements / 256
    for place in range(mask.itemsize):
        counts = np.bincount(columns[:, place], minlength=256)
        # Chi-square with 255 degrees of freedom: mean 255, standard deviation 22.6.
        assert 165 < ((counts - expected) ** 2 / expected).sum() < 345


def test_the_order_of_tensors_does_not_matter() -> None:
    state = _zeros(("b", torch.int32, 1000), ("a", torch.int32, 70), ("c", torch.int64, 5))
    turned = dict(reversed(_zeros(("b", torch.int32, 1000), ("a", torch.int32, 70), ("c", torch.int64, 5)).items()))
    add_masks(state, [(_KEY, 1)])
    add_masks(turned, [(_KEY, 1)])
    assert _equal(state, turned)


def test_no_byte_of_a_key_serves_two_elements() -> None:
    state = _zeros(("a", torch.int64, SEGMENT_BYTES // 8 + 100), ("b", torch.int64, SEGMENT_BYTES // 8))
    add_masks(state, [(_KEY, 1)])
    values = torch.cat(list(state.values())).tolist()
    assert len(set(values)) == len(values)


def test_tensors_of_any_shape_are_masked_in_place() -> None:
    state = {"scalar": torch.tensor(1, dtype=torch.int32), "cube": torch.zeros(3, 4, 5, dtype=torch.int32)}
    add_masks(state, [(_KEY, 1)])
    assert state["scalar"].shape == ()
    assert state["cube"].any()
    add_masks(state, [(_KEY, -1)])
    assert state["scalar"] == 1
    assert not state["cube"].any()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_set_event_ends_the_addition(threads: int) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(MasksCancelledError):
        add_masks(_zeros(("a", torch.int32, 1 << 20)), [(_KEY, 1)], threads, cancel)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3), torch.zeros(3, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.int32).T]
)
def test_other_tensors_are_refused_by_name(tensor: torch.Tensor) -> None:
    with pytest.raises(MaskError, match=r"^layer\.weight: "):
        add_masks({"layer.weight": tensor}, [(_KEY, 1)])


def test_blocks_outside_the_tensor_are_refused() -> None:
    state = _zeros(("a", torch.int32, 10))
    with pytest.raises(MaskError, match="a: elements 5 to 11 are not all in the tensor"):
        MaskStream(_KEY, sizes_of(state)).values("a", 5, 11)


def test_a_tensor_of_another_size_than_the_layout_is_refused() -> None:
    stream = MaskStream(_KEY, sizes_of(_zeros(("a", torch.int32, 10))))
    with pytest.raises(MaskError, match="a: 11 elements differ"):
        stream.add_to(_zeros(("a", torch.int32, 11)), 1)


@pytest.mark.parametrize("key", [b"", bytes(16), bytes(33)])
def test_keys_of_another_length_are_refused(key: bytes) -> None:
    with pytest.raises(MaskError, match="instead of 32"):
        add_masks(_zeros(("a", torch.int32, 10)), [(key, 1)])
