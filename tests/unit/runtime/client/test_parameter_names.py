"""Names of the trained tensors in a state."""

from typing import Any

import pytest
import torch

from isthmus.client.state.parameter_names import ParameterNames, buffers_of
from isthmus.client.state.shared_state import SharedState


def test_buffers_are_what_no_optimizer_trains() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    names = buffers_of(model, model.state_dict())
    assert names == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


def test_parameters_over_the_same_memory_have_names_of_their_own() -> None:
    model = torch.nn.Module()
    model.flat = torch.nn.Parameter(torch.zeros(6))
    model.head = torch.nn.Parameter(model.flat.data[:4])
    model.grid = torch.nn.Parameter(model.flat.data.view(2, 3))
    model.turned = torch.nn.Parameter(model.grid.data.t())
    model.also = torch.nn.Parameter(model.flat.data)
    model.tied = model.flat
    names = ParameterNames.of(model, model.state_dict())
    assert {name: names.find(weight) for name, weight in model.named_parameters()} == {
        name: name for name in ("flat", "head", "grid", "turned", "also")
    }
    assert buffers_of(model, model.state_dict()) == []


class Copies(torch.nn.Sequential):
    """Model whose state_dict() returns copies, as ``.cpu()`` makes of tensors on a GPU."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in super().state_dict(*args, **kwargs).items()}


def test_the_parameters_of_a_state_that_is_a_copy_are_known_by_name() -> None:
    model = Copies(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    state = model.state_dict()
    assert buffers_of(model, state) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    names = ParameterNames.of(model, state)
    assert [names.find(weight) for weight in model.parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_parameters_that_are_missing_in_the_state_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    class Renames(Copies):
        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            return {f"net.{name}": tensor for name, tensor in super().state_dict(*args, **kwargs).items()}

    SharedState(Copies(torch.nn.Linear(2, 2)))
    SharedState(torch.nn.BatchNorm1d(2, affine=False))
    assert not caplog.records
    SharedState(Renames(torch.nn.Linear(2, 2)))
    assert "none of the model's parameters is found in its state_dict()" in caplog.text
