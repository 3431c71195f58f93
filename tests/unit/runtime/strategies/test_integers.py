"""Integers and booleans: unchanged values are preserved bit for bit, and counters are averaged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.strategies import Strategy, Update, make_strategy, spill
from isthmus.strategies.averaging import averages
from isthmus.tensors import State
from isthmus_contracts.api.strategy import ALGORITHM_PARAMETERS
from isthmus_contracts.api.strategy import Strategy as Spec

from .rounds import make, run

SCALARS = {"steps": 3.0, "travel": 0.3, "loss": 0.7}
RULES = sorted(set(ALGORITHM_PARAMETERS) - {"Custom"})
MEANS = sorted(set(RULES) - {"CoordinateMedian", "TrimmedMean", "Krum", "MultiKrum", "GeometricMedian", "FedAsync"})


def constants() -> State:
    return {
        "w": torch.randn(5),
        "ends": torch.tensor([2**63 - 1, -(2**63), 2**53 + 1, 0]),
        "scalar": torch.tensor(2**62 + 1),
        "small": torch.tensor([-128, 127], dtype=torch.int8),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "flags": torch.tensor([[True, False]]),
        "none": torch.empty(0, 3, dtype=torch.int64),
    }


def rule(algorithm: str, directory: Path, deterministic: bool = False) -> Strategy:
    spec = {"algorithm": algorithm, "deterministic": deterministic and algorithm not in ("FedBuff", "FedAsync")}
    return make_strategy(Spec.model_validate(spec), directory, 3)


def contributions(states: list[State], examples: tuple[int, ...] = (7, 1, 60_000, 3, 5)) -> list[Update]:
    return [
        Update(f"p/{number}", examples[number], state, scalars=SCALARS, discount=(1.0, 0.7)[number % 2])
        for number, state in enumerate(states)
    ]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("algorithm", RULES)
def test_unchanged_values_are_preserved(
    algorithm: str, deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(averages, "_PART", 3)
    monkeypatch.setattr(spill, "BLOCK_BYTES", 100)
    base, strategy = constants(), rule(algorithm, tmp_path, deterministic)
    for _ in range(2):
        moved = [{**base, "w": base["w"] + number} for number in range(5)]
        result = run(strategy, base, contributions(moved))
        for name, tensor in base.items():
            assert result[name].dtype == tensor.dtype
            assert name == "w" or torch.equal(result[name], tensor), name


@pytest.mark.parametrize("algorithm", MEANS)
def test_counters_of_any_size_are_averaged(algorithm: str, tmp_path: Path) -> None:
    for start in (0, 2**60, -(2**63)):
        base: State = {"w": torch.zeros(2), "n": torch.tensor([start, start]), "u8": torch.tensor(3, dtype=torch.uint8)}
        steps, examples = [10, 20, 61], (1, 3, 4)
        states: list[State] = [
            {"w": torch.zeros(2), "n": base["n"] + step, "u8": torch.tensor(step, dtype=torch.uint8)} for step in steps
        ]
        updates = [replace(update, discount=1.0) for update in contributions(states, examples)]
        result = run(rule(algorithm, tmp_path), base, updates)
        mean = round(float(np.average(steps, weights=examples)))
        assert (result["n"] - start).tolist() == [mean, mean]
        assert result["u8"].item() == mean


def test_flags_go_with_the_most_examples(tmp_path: Path) -> None:
    base: State = {"flags": torch.tensor([True, False, True, False])}
    states: list[State] = [{"flags": torch.tensor(flags)} for flags in ([1, 1, 0, 0], [0, 0, 1, 1])]
    for state in states:
        state["flags"] = state["flags"].bool()
    for algorithm in ("FedAvg", "FedNova"):
        result = run(rule(algorithm, tmp_path), base, contributions(states, (3, 1)))
        assert result["flags"].tolist() == [True, True, False, False]


def test_fedasync_mixes_counters() -> None:
    base: State = {"n": torch.tensor([2**60, 10])}
    update = Update("p/0", 5, {"n": torch.tensor([2**60 + 10, 20])}, discount=0.5)
    assert run(make("FedAsync", mixing="0.6"), base, [update])["n"].tolist() == [2**60 + 3, 13]


def test_krum_copies_the_weights_of_an_update(tmp_path: Path) -> None:
    values = [2**63 - 1, -(2**63), 2**53 + 1]
    states: list[State] = [
        {"w": torch.full((2,), spread), "n": torch.tensor(values) + number}
        for number, spread in enumerate((0.0, 0.1, 0.2, 0.3, 9.0))
    ]
    base: State = {"w": torch.zeros(2), "n": torch.tensor([0, 5, -7])}
    result = run(make("Krum", tmp_path), base, contributions(states))
    assert any(torch.equal(result["w"], state["w"]) for state in states[:4])
    # Integers do not enter the choice of an update, so they are the median of all.
    assert torch.equal(result["n"][1:], states[2]["n"][1:])


@pytest.mark.parametrize("count", [4, 5])
def test_the_median_of_integers_is_exact(count: int, tmp_path: Path) -> None:
    base: State = {"n": torch.tensor([0, 0, 2**62])}
    values = [-(2**62) - 3, -5, 2**53 + 1, 2**62 + 1, 2**62 + 3][5 - count :]
    states: list[State] = [{"n": torch.tensor([value, -value, 2**62 - value // 2])} for value in values]
    result = run(make("CoordinateMedian", tmp_path), base, contributions(states))["n"].tolist()

    def middle(numbers: list[int]) -> int:
        ordered = sorted(numbers)
        if count % 2:
            return ordered[count // 2]
        total = ordered[count // 2 - 1] + ordered[count // 2]
        return total // 2 + (total % 2 and total // 2 % 2)  # halves are rounded to even

    assert result == [
        middle(values), middle([-value for value in values]), middle([2**62 - value // 2 for value in values])
    ]  # fmt: skip
