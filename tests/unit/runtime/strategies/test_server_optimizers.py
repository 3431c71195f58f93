"""FedAvgM, FedAdagrad, FedAdam and FedYogi compared with their papers' formulas in NumPy, also after a restart."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.aggregator.storage.checkpoints import CheckpointStore
from isthmus.tensors import State

from .rounds import array, make, model, run, updates, weighted_mean

Memory = dict[str, np.ndarray]
RATE, BETA1, BETA2, TAU, MOMENTUM = 0.05, 0.8, 0.95, 0.01, 0.7


def fedavgm(memory: Memory, change: np.ndarray) -> np.ndarray:
    memory["v"] = MOMENTUM * memory.get("v", 0.0) + change
    return RATE * memory["v"]


def adaptive(second: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Memory, np.ndarray], np.ndarray]:
    def step(memory: Memory, change: np.ndarray) -> np.ndarray:
        memory["m"] = BETA1 * memory.get("m", 0.0) + (1 - BETA1) * change
        memory["v"] = second(memory.get("v", np.full_like(change, TAU**2)), change**2)
        return RATE * memory["m"] / (np.sqrt(memory["v"]) + TAU)

    return step


RULES = {
    "FedAvgM": (fedavgm, {"momentum": MOMENTUM}),
    "FedAdagrad": (adaptive(lambda v, square: v + square), {"beta1": BETA1, "tau": TAU}),
    "FedAdam": (
        adaptive(lambda v, square: BETA2 * v + (1 - BETA2) * square),
        {"beta1": BETA1, "beta2": BETA2, "tau": TAU},
    ),
    "FedYogi": (
        adaptive(lambda v, square: v - (1 - BETA2) * square * np.sign(v - square)),
        {"beta1": BETA1, "beta2": BETA2, "tau": TAU},
    ),
}


def parameters(algorithm: str) -> dict[str, str]:
    return {"learningRate": str(RATE)} | {name: str(value) for name, value in RULES[algorithm][1].items()}


@pytest.mark.parametrize("algorithm", RULES)
def test_as_in_the_paper(algorithm: str) -> None:
    strategy, step = make(algorithm, **parameters(algorithm)), RULES[algorithm][0]
    base, memories = model(), {"w": Memory(), "b": Memory()}
    for number in range(5):
        contributions = updates(base, 3, seed=number)
        expected = {
            name: array(base[name]) + step(memory, weighted_mean(contributions, name) - array(base[name]))
            for name, memory in memories.items()
        }
        result = run(strategy, base, contributions)
        for name, value in expected.items():
            assert result[name].dtype == base[name].dtype
            np.testing.assert_allclose(array(result[name]), value, rtol=1e-4, atol=1e-6)
        assert result["seen"].item() == round(float(weighted_mean(contributions, "seen")))
        base = result


@pytest.mark.parametrize("algorithm", RULES)
def test_what_is_not_trained_is_averaged(algorithm: str) -> None:
    # A variance that shrinks fast: an adaptive step would make it negative.
    base = {"w": torch.ones(2), "var": torch.full((2,), 0.01)}
    strategy = make(algorithm)
    for update in updates(base, 3, seed=0, spread=0.0):
        tensors: State = {"w": base["w"] * 0.9, "var": base["var"] * 0.5}
        contribution = replace(update, tensors=tensors, buffers=frozenset({"var"}))
        result = run(strategy, base, [contribution])
        assert result["var"].tolist() == pytest.approx([0.005, 0.005])
        assert result["w"].tolist() != pytest.approx([0.9, 0.9]) or algorithm == "FedAvgM"


@pytest.mark.parametrize("algorithm", RULES)
def test_a_restarted_aggregator_goes_on_identically(algorithm: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, "uid", keep=2)
    store.open()
    undisturbed = resumed = model()
    steady, restarted = make(algorithm), make(algorithm)
    for number in range(1, 5):
        contributions = updates(undisturbed, 3, seed=number)
        undisturbed = run(steady, undisturbed, contributions)
        store.save(number, run(restarted, resumed, contributions), restarted.state())
        checkpoint, restarted = store.latest(), make(algorithm)
        assert checkpoint is not None
        resumed = checkpoint.state
        restarted.load_state(checkpoint.strategy)
        assert all(torch.equal(resumed[name], tensor) for name, tensor in undisturbed.items())


def test_another_rules_state_is_left_alone() -> None:
    base = model()
    adam, yogi, fresh = make("FedAdam"), make("FedYogi"), make("FedYogi")
    run(adam, base, updates(base, 2, seed=1))
    yogi.load_state(adam.state())
    contributions = updates(base, 2, seed=2)
    assert torch.equal(run(yogi, base, contributions)["w"], run(fresh, base, contributions)["w"])
