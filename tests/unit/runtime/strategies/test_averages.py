"""Means of many updates against double precision, and values that no client changes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from isthmus.strategies import GREATEST_WEIGHT, Strategy, Update
from isthmus.strategies.averaging import averages
from isthmus.strategies.averaging.averages import IntegerMean, Mean
from isthmus.tensors import State
from isthmus_contracts.api.strategy import ALGORITHM_PARAMETERS

from .rounds import make, run

RULES = sorted(set(ALGORITHM_PARAMETERS) - {"Custom"})
CHANGE_RULES = ["FedNova", "QFedAvg", "SCAFFOLD", "FedDyn", "FedBuff"]
ROBUST = ["CoordinateMedian", "TrimmedMean", "Krum", "MultiKrum", "GeometricMedian"]
SCALARS = {"steps": 3.0, "travel": 0.3, "loss": 0.7}
COUNT = 500


def whole(values: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    yield slice(0, len(values)), values


Values = Callable[[int, torch.Generator], torch.Tensor]
VALUES: dict[str, Values] = {
    "near each other": lambda _, dice: torch.linspace(0.5, 2, COUNT) * (1 + 0.3 * torch.randn(COUNT, generator=dice)),
    "two kinds": lambda number, _: torch.linspace(0.5, 2, COUNT) * (1 if number < 1000 else 1 + 2**-13),
    "the first alone differs": lambda number, _: torch.linspace(0.5, 2, COUNT) * (3 if number else 1),
}
WEIGHTS = {
    "equal": [600] * 5000,
    "one large one first": [10**8] + [1] * 5000,
    "one large one last": [1] * 5000 + [10**8],
    "of all sizes": [2 ** (number % 40) for number in range(3000)],
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("values", VALUES)
def test_the_mean_of_thousands_is_as_good_as_single_precision(values: str, weights: str) -> None:
    dice, mean = torch.Generator().manual_seed(1), Mean(torch.empty(COUNT))
    expected = torch.zeros(COUNT, dtype=torch.float64)
    for number, weight in enumerate(WEIGHTS[weights]):
        tensor = VALUES[values](number, dice)
        mean.add(whole(tensor), weight)
        expected.add_(tensor, alpha=weight)
    expected.div_(sum(WEIGHTS[weights]))
    assert float(((mean.value - expected) / expected).abs().max()) < 2e-7


def test_halves_of_whole_numbers_are_exact() -> None:
    for count in (3, 7, 1001):
        mean = IntegerMean(torch.empty(2, dtype=torch.int64))
        for number in range(2 * count):
            mean.add(whole(torch.tensor([float(number % 2), -3.0])), 3.0)
        assert mean.value.tolist() == [0.5, -3.0]


def frozen() -> State:
    generator = torch.Generator().manual_seed(2)
    values = torch.cat([torch.randn(200, generator=generator), torch.tensor([-0.0, 0.0, 1e-42, -1e-42, 1e18, -1e18])])
    return {
        "w": torch.randn(50, generator=generator),
        "single": values,
        "double": values.double() / 3,
        "half": values.clamp(-6e4, 6e4).half(),
        "brain": values.bfloat16(),
        "statistics": values.abs(),
        "scalar": torch.tensor(0.1),
        "none": torch.empty(0),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("clients", [1, 3, 100])
@pytest.mark.parametrize("algorithm", RULES)
def test_unchanged_values_are_preserved_bit_for_bit(
    algorithm: str, clients: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(averages, "_PART", 64)
    tiny = {"tau": "1e-30"} if algorithm in ("FedAdam", "FedYogi", "FedAdagrad") else {}
    base, strategy = frozen(), make(algorithm, tmp_path, clients, **tiny)
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        updates = [
            Update(
                f"p/{client}", 10**8 if client == 1 else client + 1,
                {**base, "w": base["w"] + 0.1 * torch.randn(50, generator=generator)},
                frozenset({"statistics"}), SCALARS, discount=0.7 if client % 3 else 1.0,
            )
            for client in range(clients)
        ]  # fmt: skip
        result = run(strategy, base, updates)
        for name, tensor in base.items():
            assert result[name].dtype == tensor.dtype
            assert name == "w" or bits(result[name]) == bits(tensor), name
        assert not torch.equal(result["w"], base["w"])


@pytest.mark.parametrize("algorithm", [*CHANGE_RULES, "FedAvg", "FedAvgM", "FedAdam"])
def test_statistics_stay_between_those_of_the_clients(algorithm: str) -> None:
    # A variance that shrinks by more than single precision holds: its rounded change may exceed it.
    base: State = {"w": torch.zeros(2), "var": torch.tensor([3e8, 1e9, 7e11, 1.0])}
    for seed in range(20):
        dice = torch.Generator().manual_seed(seed)
        variances = torch.rand(5, 4, generator=dice) * 1e-3
        updates = [
            Update(
                f"p/{number}", 37 * number + 1, {"w": torch.ones(2), "var": variances[number]},
                frozenset({"var"}), SCALARS,
            )
            for number in range(5)
        ]  # fmt: skip
        result = run(make(algorithm, clients=5), base, updates)["var"]
        assert (result >= variances.min(dim=0).values).all()
        assert (result <= variances.max(dim=0).values).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("algorithm", sorted({*RULES} - {*ROBUST}))
def test_one_liar_leaves_a_model_that_clients_can_hand_in_again(algorithm: str, dtype: torch.dtype) -> None:
    """Results within the bounds of updates, over several rounds, since momentum accumulates."""
    most = min(GREATEST_WEIGHT, torch.finfo(dtype).max)
    base: State = {"w": torch.tensor([0.1, -0.1], dtype=dtype)}
    strategy: Strategy = make(algorithm, clients=5)
    for number in range(30):
        far = {"w": torch.tensor([most, -most], dtype=dtype) * (-1) ** (number // 3)}
        updates = [
            Update(f"p/{client}", 100, base, scalars={"steps": 5.0, "travel": 0.1, "loss": 0.7}) for client in range(4)
        ]
        liar = Update("p/4", 2**53, far, scalars={"steps": 1e-9, "travel": 1e-9, "loss": 1e300})
        result = run(strategy, base, [*updates, liar])["w"].clone()
        assert bool((result.abs() <= most).all()), (number, result)
        base = {"w": result}
