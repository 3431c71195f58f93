"""With strategy.deterministic the order of arrival does not change a bit of the result."""

import errno
import os
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch

from isthmus.strategies import make_strategy
from isthmus.tensors import State
from isthmus_contracts.api.strategy import ALGORITHM_PARAMETERS, Strategy

from .rounds import run, updates

RULES = sorted(set(ALGORITHM_PARAMETERS) - {"Custom", "FedBuff", "FedAsync"})


def base() -> State:
    torch.manual_seed(0)
    return {"w": torch.randn(40, 50), "h": torch.randn(7).half(), "e": torch.empty(0), "n": torch.tensor(10)}


def same(one: State, other: State) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("algorithm", RULES)
def test_every_order_makes_the_same_bits(algorithm: str, tmp_path: Path) -> None:
    spec = Strategy.model_validate({"algorithm": algorithm, "deterministic": True})
    scalars = {"steps": 3.0, "travel": 0.3, "loss": 0.7}
    contributions = [replace(update, scalars=scalars) for update in updates(base(), 5, seed=5)]
    results = []
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        strategy = make_strategy(spec, tmp_path, 5)
        first = run(strategy, base(), [contributions[index] for index in order])
        results.append((first, run(strategy, first, [contributions[index] for index in reversed(order)])))
    assert all(same(one, results[0][0]) and same(two, results[0][1]) for one, two in results[1:])
    assert list(tmp_path.iterdir()) == []  # the file on disk is gone


def test_it_is_the_plain_rule_otherwise(tmp_path: Path) -> None:
    contributions = updates(base(), 4, seed=2)
    plain = run(make_strategy(Strategy(), tmp_path), base(), contributions)
    spec = Strategy.model_validate({"deterministic": True})
    assert same(plain, run(make_strategy(spec, tmp_path), base(), contributions))


def test_without_it_the_order_shows() -> None:
    """Without strategy.deterministic the order matters; otherwise the tests above would prove nothing."""
    contributions = updates(base(), 4, seed=2)
    results = [run(make_strategy(Strategy()), base(), list(order)) for order in permutations(contributions)]
    assert not all(same(result, results[0]) for result in results)


def test_an_update_that_cannot_be_kept_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contributions = updates(base(), 3, seed=2)
    spec = Strategy.model_validate({"deterministic": True})
    strategy, whole = make_strategy(spec, tmp_path), os.pwrite
    strategy.begin(base())
    strategy.accept(contributions[0])
    left = 2

    def full(file: int, data: memoryview, position: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(file, data[:7], position)

    with monkeypatch.context() as broken:
        broken.setattr("os.pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            strategy.accept(contributions[1])
    strategy.accept(contributions[2])
    assert same(strategy.finish(), run(make_strategy(spec, tmp_path), base(), [contributions[0], contributions[2]]))
