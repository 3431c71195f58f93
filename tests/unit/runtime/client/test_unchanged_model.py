"""Warning for a script that trains something other than its model."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch

from isthmus.client.state.unchanged_model import UnchangedModelCheck


def build() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Embedding(1000, 2), torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))


def trains_a_copy(model: torch.nn.Module) -> None:
    copy = deepcopy(model)
    copy[1](torch.ones(2)).sum().backward()  # type: ignore[index]
    torch.optim.SGD(copy.parameters(), lr=0.1).step()


def trains_one_row(model: torch.nn.Module) -> None:
    model[0](torch.tensor([1])).sum().backward()  # type: ignore[index]
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def writes_by_hand(model: torch.nn.Module) -> None:
    model[1].weight.data = model[1].weight.data + 1  # type: ignore[index]


def counts_a_batch(model: torch.nn.Module) -> None:
    model[2](torch.ones(2, 3))  # type: ignore[index]


@pytest.mark.parametrize("train", [trains_one_row, writes_by_hand, counts_a_batch])
def test_a_changed_model_gives_no_warning(
    train: Callable[[torch.nn.Module], None], caplog: pytest.LogCaptureFixture
) -> None:
    model, untouched = build(), UnchangedModelCheck()
    untouched.begin(model.state_dict())
    train(model)
    untouched.compare(model.state_dict(), 1)
    assert not caplog.records


def test_training_a_copy_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    model, untouched = build(), UnchangedModelCheck()
    for number in (1, 2):
        untouched.begin(model.state_dict())
        trains_a_copy(model)
        untouched.compare(model.state_dict(), number)
    assert [record.getMessage()[:43] for record in caplog.records] == ["round 1: the update equals the global model"]
