"""FedBuff and FedAsync against their papers' formulas in NumPy; late updates under the other rules."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from isthmus.aggregator.updates.base_models import rebase
from isthmus.strategies import Update
from isthmus.tensors import State

from .rounds import array, make, model, run, updates


def discounted(contributions: list[Update], discounts: list[float]) -> list[Update]:
    return [replace(update, discount=discount) for update, discount in zip(contributions, discounts, strict=True)]


def test_fedbuff_moves_by_the_mean_of_discounted_changes() -> None:
    strategy, base, discounts = make("FedBuff", learningRate="0.5"), model(), [1.0, 0.5, 0.25]
    for number in range(2):
        contributions = discounted(updates(base, 3, seed=number), discounts)
        total = sum(update.num_examples for update in contributions)
        step = sum(
            discount * update.num_examples / total * (array(update.tensors["w"]) - array(base["w"]))
            for update, discount in zip(contributions, discounts, strict=True)
        )
        result = run(strategy, base, contributions)
        np.testing.assert_allclose(array(result["w"]), array(base["w"]) + 0.5 * step, rtol=1e-5, atol=1e-6)
        base = result


def test_fedbuff_of_fresh_updates_is_fedavg() -> None:
    base = model()
    contributions = updates(base, 4, seed=3)
    torch.testing.assert_close(run(make("FedBuff"), base, contributions), run(make("FedAvg"), base, contributions))


def test_fedasync_mixes_updates_in_one_by_one() -> None:
    base, discounts = model(), [1.0, 0.5]
    contributions = discounted(updates(base, 2, seed=1), discounts)
    expected = array(base["w"])
    for update, discount in zip(contributions, discounts, strict=True):
        share = 0.8 * discount
        expected = (1 - share) * expected + share * array(update.tensors["w"])
    result = run(make("FedAsync", mixing="0.8"), base, contributions)
    np.testing.assert_allclose(array(result["w"]), expected, rtol=1e-5, atol=1e-6)
    assert result["seen"].dtype == torch.int64
    assert not make("FedAsync").rebases


@pytest.mark.parametrize(
    "algorithm",
    ["FedAvg", "FedAvgM", "FedAdam", "FedNova", "QFedAvg", "SCAFFOLD", "FedDyn", "FedBuff"],
)
def test_a_discounted_update_counts_as_fewer_examples(algorithm: str) -> None:
    base, scalars = model(), {"steps": 3.0, "travel": 0.3, "loss": 0.7}
    whole = [replace(update, scalars=scalars) for update in updates(base, 3, seed=5)]
    late = [*whole[:2], replace(whole[2], num_examples=whole[2].num_examples * 2, discount=0.5)]
    once, twice = run(make(algorithm, clients=3), base, whole), run(make(algorithm, clients=3), base, late)
    if algorithm == "FedBuff":  # the discount is not normalised
        total = sum(update.num_examples for update in whole)
        share = total / (total + whole[2].num_examples)
        np.testing.assert_allclose(
            array(twice["w"]) - array(base["w"]), share * (array(once["w"]) - array(base["w"])), rtol=1e-4, atol=1e-6
        )
    else:
        torch.testing.assert_close(once, twice)


def test_an_update_of_an_older_model_keeps_its_change() -> None:
    old, new = model(1), model(2)
    trained = updates(old, 1, seed=4)[0].tensors
    moved: State = {name: tensor.clone() for name, tensor in trained.items()}
    rebase(moved, old, new, {"b"})
    torch.testing.assert_close(moved["w"] - new["w"], trained["w"] - old["w"])
    assert torch.equal(moved["b"], trained["b"])  # a buffer
    assert moved["seen"] - new["seen"] == trained["seen"] - old["seen"]


@pytest.mark.parametrize("weights", [False, True])
def test_late_updates_never_take_counters_back(weights: bool) -> None:
    limits = [-(2**63), 2**63 - 1]
    cases = [  # dtype, base model, client's model, present model, result
        (torch.int64, 300, 350, 500, 550),
        (torch.int64, 2**62, 2**62 + 3, 2**62 + 10, 2**62 + 13),
        *(
            (torch.int64, low, high, start, 2**63 - 1)
            for low, high in [limits, (-1, 2**63 - 1)]
            for start in (5, 2**62)
        ),
        *(
            (torch.int64, high, low, start, -(2**63))
            for low, high in [limits, (-(2**63), 2)]
            for start in (-5, -(2**62))
        ),
        (torch.int64, -(2**63), 2**63 - 1, -(2**63), 2**63 - 1),
        (torch.int8, 100, 120, 110, 127),
        (torch.uint8, 200, 10, 100, 0),
        (torch.int32, 7, 7, -(2**31), -(2**31)),
        (torch.bool, 0, 1, 0, 1),
        (torch.bool, 1, 1, 0, 0),
        (torch.bool, 0, 1, 1, 1),
    ]
    for dtype, old, trained, new, expected in cases:
        tensors: State = {"n": torch.tensor([trained], dtype=dtype)}
        then, now = ({"n": torch.tensor([value], dtype=dtype)} for value in (old, new))
        rebase(tensors, then, now, {"n"}, weights)
        assert tensors["n"].dtype == dtype
        assert tensors["n"].tolist() == [expected], (dtype, old, trained, new)


def test_weights_that_a_late_client_left_alone_are_those_of_the_present_model() -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(3))
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        old, new = {"w": values.to(dtype)}, {"w": (values * 3 + 0.1).to(dtype)}
        new["w"][0] = -0.0
        update = {"w": old["w"].clone()}
        rebase(update, old, new, ())
        assert torch.equal(update["w"].view(torch.uint8), new["w"].view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_change_of_half_precision_may_be_more_than_it_holds(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    old = {"w": torch.tensor([-largest, -largest, 1.0], dtype=dtype)}
    new = {"w": torch.tensor([-largest, largest, 2.0], dtype=dtype)}
    update = {"w": torch.tensor([largest, largest, 3.0], dtype=dtype)}
    rebase(update, old, new, ())
    assert update["w"].tolist() == [largest, largest, 4.0]
