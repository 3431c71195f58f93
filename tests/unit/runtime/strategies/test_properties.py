"""Properties of every rule, for random dtypes, shapes, scales and client weights."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from isthmus.strategies import GREATEST_WEIGHT, Update, make_strategy
from isthmus.tensors import State
from isthmus_contracts.api.strategy import ALGORITHM_PARAMETERS
from isthmus_contracts.api.strategy import Strategy as Spec

from .rounds import make, run

RULES = sorted(set(ALGORITHM_PARAMETERS) - {"Custom"})
AVERAGES = ("FedAvg", "FedProx", "CoordinateMedian", "TrimmedMean", "Krum", "MultiKrum", "GeometricMedian")
SERVER = ("FedAvgM", "FedAdagrad", "FedAdam", "FedYogi")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SHAPES = ((), (0,), (1,), (3,), (2, 3), (0, 5), (4, 1, 2), (300,))
SCENARIOS = range(8)


@dataclass
class Scenario:
    """Generate a global model, clients' updates, and the names of tensors that no client changes."""

    model: State
    updates: list[Update]
    frozen: set[str]
    variances: set[str]


def scenario(seed: int) -> Scenario:
    dice, torch_dice = random.Random(seed), torch.Generator().manual_seed(seed)  # noqa: S311
    count = dice.choice([1, 2, 3, 5, 9, 40])
    model: State = {}
    states: list[State] = [{} for _ in range(count)]
    frozen, buffers = set(), set()

    def normal(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> torch.Tensor:
        values = torch.randn(shape, generator=torch_dice, dtype=torch.float64) * scale
        return values.clamp(-most_of(dtype), most_of(dtype)).to(dtype)

    for kind in ("trained", "trained", "frozen", "tied", "variance", "variance", "mean"):
        name, shape, dtype = f"{kind}.{len(model)}", dice.choice(SHAPES), dice.choice(FLOATS)
        scale = 10.0 ** dice.choice([0, 0, -3, 2, -20, 17])
        model[name] = normal(shape, dtype, scale)
        for state in states:
            away = normal(shape, torch.float64, scale * 10.0 ** dice.choice([0, -2, -5]))
            moved = (model[name].double() + away).clamp(-most_of(dtype), most_of(dtype)).to(dtype)
            state[name] = model[name].clone() if kind == "frozen" else moved
        if kind == "variance":
            # Variances may shrink to almost zero.
            smaller = 10.0 ** dice.choice([0, -4, -9])
            model[name] = model[name].abs()
            for state in states:
                state[name] = (state[name].double().abs() * smaller).to(dtype)
        if kind in ("variance", "mean"):
            buffers.add(name)
        if kind == "tied":
            for tensors in (model, *states):
                tensors[f"{name}.again"] = tensors[name].clone()
        if kind == "frozen":
            frozen.add(name)
    for kind in ("counter", "frozen"):
        dtype = dice.choice(INTEGERS)
        name, limits = f"{kind}.{len(model)}", torch.iinfo(dtype)
        low, high = (0, 100) if kind == "counter" else (limits.min // 2, limits.max)
        model[name] = torch.randint(low, high, (5,), generator=torch_dice).to(dtype)
        for state in states:
            steps = torch.randint(0, 20, (5,), generator=torch_dice).to(dtype)
            state[name] = model[name] + steps if kind == "counter" else model[name].clone()
        if kind == "frozen":
            frozen.add(name)
    model["flags"] = torch.tensor([True, False])
    for state in states:
        state["flags"] = torch.rand(2, generator=torch_dice) < 0.5
    updates = [
        Update(
            f"p/{number:02}", int(10 ** dice.uniform(0, dice.choice([0.5, 3, 9]))), state, frozenset(buffers),
            {name: 10 ** dice.uniform(low, 2) for name, low in (("steps", -1), ("travel", -4), ("loss", -6))},
            dice.choice([1.0, 1.0, 0.5**0.5, 1e-30]),
        )
        for number, state in enumerate(states)
    ]  # fmt: skip
    return Scenario(model, updates, frozen, {name for name in buffers if name.startswith("variance")})


@pytest.mark.parametrize("algorithm", RULES)
def test_for_every_model(algorithm: str, tmp_path: Path) -> None:
    for seed in SCENARIOS:
        case = scenario(seed)
        before = [{name: bits(tensor) for name, tensor in state.items()} for state in states_of(case)]
        result = run(make(algorithm, tmp_path, len(case.updates)), case.model, case.updates)
        assert [{name: bits(tensor) for name, tensor in state.items()} for state in states_of(case)] == before
        assert list(result) == list(case.model)
        for name, old in case.model.items():
            where, new = (algorithm, seed, name), result[name]
            assert (new.dtype, new.shape) == (old.dtype, old.shape), where
            if name in case.frozen:
                assert bits(new) == bits(old), where
            if name.endswith(".again"):
                assert bits(new) == bits(result[name.removesuffix(".again")]), where
            values = torch.stack([update.tensors[name].double() for update in case.updates])
            low, high = values.amin(dim=0), values.amax(dim=0)
            if old.is_floating_point():
                assert bool(torch.isfinite(new).all()) and bool((new.abs() <= GREATEST_WEIGHT).all()), where
                statistics = name in case.updates[0].buffers and algorithm != "FedAsync"
                slack = 2e-7 * torch.maximum(low.abs(), high.abs()) if algorithm in AVERAGES and not statistics else 0.0
                if algorithm in AVERAGES or statistics:
                    rounded = (low - slack).to(old.dtype), (high + slack).to(old.dtype)
                    assert bool(((new >= rounded[0]) & (new <= rounded[1])).all()), where
                if name in case.variances:
                    assert bool((new >= 0).all()), where
            elif algorithm != "FedAsync":
                assert bool(((new.double() >= low) & (new.double() <= high)).all()), where


@pytest.mark.parametrize("algorithm", [name for name in RULES if name not in ("FedBuff", "FedAsync")])
def test_the_order_does_not_matter_where_the_job_says_so(algorithm: str, tmp_path: Path) -> None:
    for seed in SCENARIOS[:4]:
        case = scenario(seed)
        spec = Spec.model_validate({"algorithm": algorithm, "deterministic": True})
        rules = [make_strategy(spec, tmp_path, len(case.updates)) for _ in range(2)]
        there, back = run(rules[0], case.model, case.updates), run(rules[1], case.model, case.updates[::-1])
        assert all(bits(there[name]) == bits(back[name]) for name in there), (algorithm, seed)


Change = Callable[[list[Update]], list[Update]]
SAME: dict[str, Change] = {
    "weights are ratios": lambda updates: [replace(update, num_examples=update.num_examples * 7) for update in updates],
    "one client as three": lambda updates: [
        replace(update, client=f"{update.client}.{copy}") for update in updates for copy in range(3)
    ],
}


@pytest.mark.parametrize("same", SAME)
@pytest.mark.parametrize("algorithm", ["FedAvg", "FedAvgM", "FedNova", "SCAFFOLD", "QFedAvg", "FedDyn"])
def test_equivalent_updates_give_the_same_result(algorithm: str, same: str, tmp_path: Path) -> None:
    """Make a strategy for a job whose clients all take part in the round."""
    for seed in SCENARIOS:
        case = scenario(seed)
        scalars = {"steps": 7.0, "travel": 0.1, "loss": 0.7}
        updates = [replace(update, scalars=scalars, discount=1.0) for update in case.updates]
        others = SAME[same](updates)
        one = run(make(algorithm, tmp_path, len(updates)), case.model, updates)
        other = run(make(algorithm, tmp_path, len(others)), case.model, others)
        for name, old in case.model.items():
            if not old.is_floating_point():
                assert torch.equal(one[name], other[name]), (algorithm, same, seed, name)
                continue
            sizes = [case.model[name], *(update.tensors[name] for update in updates)]
            scale = max((float(size.double().abs().max()) for size in sizes if size.numel()), default=0.0)
            unit = max(torch.finfo(old.dtype).eps, torch.finfo(torch.float32).eps)
            difference = (one[name].double() - other[name].double()).abs()
            assert not old.numel() or float(difference.max()) <= 16 * unit * scale + 1e-7 * (old.dtype == torch.float16)


def most_of(dtype: torch.dtype) -> float:
    return min(torch.finfo(dtype).max, GREATEST_WEIGHT)


def states_of(case: Scenario) -> list[State]:
    return [case.model, *(update.tensors for update in case.updates)]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
