"""Independence of torch.set_default_device(), of set_default_dtype(), and of unusual strides."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isthmus.aggregator.storage import safetensors_file
from isthmus.codecs import Decoder, encode, parse_chain
from isthmus.codecs.base import SEGMENT
from isthmus.privacy import Private
from isthmus.strategies import Update, make_strategy
from isthmus.strategies.spill import Spill
from isthmus.tensors import RawDecoder, State, allocate, bytes_view, checksum_of, chunks_of, flat, snapshot, specs_of
from isthmus_contracts.api.compression import Compression
from isthmus_contracts.api.strategy import Strategy

SEED = "3/pool/0"
UPLOADS = ["None", "Zstd", "Float16", "BFloat16", "Int8", "Int4", "Rotation+Int8", "Rotation+Int4+Zstd", "TopK",
           "TopK+BFloat16", "TopK+Int8", "TopK+Int4+Zstd"]  # fmt: skip
STRATEGIES = ["FedAvg", "FedAvgM", "FedAdam", "FedAdagrad", "FedYogi", "CoordinateMedian", "TrimmedMean", "Krum",
              "MultiKrum", "GeometricMedian",
              "FedNova", "SCAFFOLD", "FedDyn", "QFedAvg", "FedBuff", "FedAsync"]  # fmt: skip


@pytest.fixture(params=["meta", "float64", "bfloat16"])
def leak(request: pytest.FixtureRequest) -> Iterator[None]:
    """Default device or dtype of the script; "meta" stands for a GPU."""
    before = torch.get_default_dtype()
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(before)


def tensors(seed: int) -> State:
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    return {
        "w": normal(SEGMENT + 300), "half": normal(400).to(torch.bfloat16), "wide": normal(300).double(),
        "b": normal(3), "n": torch.full((), 7, dtype=torch.int64, device="cpu"),
    }  # fmt: skip


BASE, STATE = tensors(1), tensors(2)


def round_trip(name: str) -> tuple[bytes, State]:
    chain = parse_chain(Compression(upload=name).upload_codecs)
    encoded = encode(STATE, chain, SEED, BASE)
    encoded = encode(STATE, chain, SEED, BASE, encoded.residual)
    decoder = Decoder(encoded.specs, chain, SEED, BASE)
    for chunk in encoded.chunks:
        decoder.write(chunk)
    return b"".join(encoded.chunks), decoder.finish(encoded.checksum)


def aggregated(name: str) -> State:
    spec = Strategy(algorithm=name, deterministic=name == "FedAvg")
    rule = make_strategy(spec, None, 3)
    scalars = {"steps": 2.0, "travel": 0.1, "loss": 1.0}
    model = BASE
    for _ in range(2):
        rule.begin(model)
        for client in range(3):
            rule.accept(Update(str(client), 5, tensors(10 + client), frozenset({"b"}), scalars))
        model = {key: tensor.clone() for key, tensor in rule.finish().items()}
    return model


def private() -> State:
    mechanism = Private(make_strategy(Strategy(algorithm="FedAvg")), 1.0, 0.0, 3)
    mechanism.begin(BASE)
    for client in range(3):
        mechanism.accept(Update(str(client), 5, tensors(10 + client)))
    return mechanism.finish()


def received() -> State:
    copy = snapshot(STATE)
    reception = RawDecoder(specs_of(copy))
    for chunk in chunks_of(copy):
        reception.write(chunk)
    return reception.finish(checksum_of(copy))


EXPECTED_TRIPS = {name: round_trip(name) for name in UPLOADS}
EXPECTED_MODELS = {name: aggregated(name) for name in STRATEGIES}
EXPECTED_PRIVATE = private()


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.usefixtures("leak")
@pytest.mark.parametrize("name", UPLOADS)
def test_codecs_make_the_same_bytes_and_tensors(name: str) -> None:
    data, state = round_trip(name)
    assert data == EXPECTED_TRIPS[name][0]
    assert same(state, EXPECTED_TRIPS[name][1])


@pytest.mark.usefixtures("leak")
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_make_the_same_model(name: str) -> None:
    assert same(aggregated(name), EXPECTED_MODELS[name])


@pytest.mark.usefixtures("leak")
def test_differential_privacy_and_raw_transfer_are_the_same() -> None:
    assert same(private(), EXPECTED_PRIVATE)
    assert same(received(), STATE)


def odd() -> State:
    """Return tensors that count as contiguous, but whose strides ``view(dtype)`` rejects."""
    return {
        "expanded": torch.tensor(1.5).expand(1),
        "column": torch.arange(7.0).reshape(1, 7)[:, 3],
        "matrix": torch.arange(6.0)[2].expand(1, 1),
        "none": torch.empty(0, 5)[:, 0],
        "counter": torch.tensor([3, 4])[::2],
    }


@pytest.mark.parametrize("name", UPLOADS)
def test_one_element_with_a_stride_travels(name: str) -> None:
    chain = parse_chain(Compression(upload=name).upload_codecs)
    encoded = encode(odd(), chain, SEED, odd())
    decoder = Decoder(encoded.specs, chain, SEED, odd())
    for chunk in encoded.chunks:
        decoder.write(chunk)
    assert same(decoder.finish(encoded.checksum), odd())


def test_one_element_with_a_stride_is_received_spilled_and_written(tmp_path: Path) -> None:
    state = odd()
    reception = RawDecoder(specs_of(state), room=dict(state))
    for chunk in chunks_of(snapshot(state)):
        reception.write(chunk)
    assert same(reception.finish(checksum_of(state)), odd())
    spill = Spill(tmp_path, state)
    spill.add("a", state)
    assert same(spill.update(0), state)
    spill.close()
    safetensors_file.write(tmp_path / "file.safetensors", state, {})
    assert same(load_file(tmp_path / "file.safetensors"), state)


def test_the_flat_values_of_what_is_not_contiguous_are_in_its_own_order() -> None:
    table = torch.arange(6.0).reshape(2, 3).t()
    assert flat(table).tolist() == [0, 3, 1, 4, 2, 5]
    assert bytes(bytes_view(table)) == table.numpy().tobytes()
    (spec,) = specs_of({"w": table})
    assert flat(allocate(spec)).shape == (6,)
