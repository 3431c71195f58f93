"""Tensors without gradients are sent raw: batch-norm statistics, EMA copies, the ranges of observers."""

import pytest
import torch
from torch import nn

from isthmus.client.state.shared_state import SharedState
from isthmus.codecs import encode
from isthmus.codecs.base import RAW_BELOW

from .test_streams import CHAINS, SEED, chain, decoded

LOSSY = [name for name in CHAINS if name != "Zstd"]


@pytest.mark.parametrize("name", LOSSY)
def test_named_tensors_pass_the_lossy_codecs_by(name: str) -> None:
    base = {"weight": torch.randn(4000), "running_var": torch.full((512,), 100.0)}
    state = {"weight": base["weight"] + 0.01 * torch.randn(4000), "running_var": torch.rand(512)}
    residual = None
    for _ in range(3):
        encoded = encode(state, chain(name), SEED, base, residual, raw=["running_var"])
        received = decoded(encoded, base)
        assert torch.equal(received["running_var"], state["running_var"])
        assert not torch.equal(received["weight"], state["weight"])
        residual = encoded.residual
        if residual is not None:
            assert residual.read("running_var", (512,), 0, 512) is None
            assert residual.read("weight", (4000,), 0, 4000) is not None


@pytest.mark.parametrize("name", LOSSY)
def test_a_frozen_tensor_is_sent_raw_only_where_it_has_changed(name: str) -> None:
    count = 4 * RAW_BELOW
    base = {"still": torch.randn(count), "moved": torch.randn(count)}
    state = {"still": base["still"].clone(), "moved": base["moved"] + 1}
    encoded = encode(state, chain(name), SEED, base, frozen=["still", "moved"])
    assert {spec.name: spec.raw for spec in encoded.specs} == {"still": False, "moved": True}
    assert encoded.specs[0].size < encoded.specs[1].size == 4 * count
    assert torch.equal(decoded(encoded, base)["moved"], state["moved"])


@pytest.mark.parametrize("name", ["TopK", "TopK+Int8", "Int8", "Rotation+Int8"])
def test_a_variance_that_shrinks_by_orders_of_magnitude_stays_above_zero(name: str) -> None:
    """Statistics of the client's data in each round, which are not a sum of earlier changes."""
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(512, momentum=0.5)
    shared, residual = SharedState(layer), None
    scales = torch.logspace(-3, 3, 512)
    model = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    for _ in range(12):
        shared.load(model)
        for _ in range(4):
            layer(torch.randn(32, 512) * scales)
        live = shared.live()
        encoded = encode(live, chain(name), SEED, model, residual, raw=shared.buffers(live), frozen=shared.frozen(live))
        model, residual = decoded(encoded, model), encoded.residual
        assert torch.equal(model["running_var"], layer.running_var)  # type: ignore[arg-type]
        assert (model["running_var"] > 0).all()


def test_which_parameters_are_frozen() -> None:
    model = nn.ModuleDict({"trained": nn.Linear(3, 3), "average": nn.Linear(3, 3), "discriminator": nn.Linear(3, 3)})
    model["average"].requires_grad_(requires_grad=False)
    model["discriminator"](torch.randn(2, 3)).sum().backward()
    model["discriminator"].requires_grad_(requires_grad=False)  # as scripts of GANs do while they train the generator
    shared = SharedState(model)
    assert shared.frozen(shared.live()) == ["average.weight", "average.bias"]
