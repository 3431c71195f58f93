"""Test vectors of other frameworks, each with its public repository and file.

If a rule differs by definition, the expected number is the paper's, and the peer's is noted beside it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.strategies import Update

from .rounds import make, run

A, B = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[29.0, 23.0, 19.0], [17.0, 13.0, 11.0]]
BYZFL = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]
BLADES = [[1.0, 2.0, 3.0], [-1.0, 4.0, -1.0], [2.0, 2.0, 3.0], [3.0, 1.0, 3.0]]
BYZML = [[0.1, 0.2, 0.3, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.3, 0.4, 0.5], [0.3, 0.4, 0.5, 0.4, 0.5, 0.6], [-0.9] * 6]
HEALTH = [np.where(np.arange(8).reshape(2, 2, 2) == 0, 10.0, 1.0), np.ones((2, 2, 2)), np.full((2, 2, 2), 2.0)]
FERMAT = (3 - math.sqrt(3)) / 6

FLOWER = "adap/flower framework/py/flwr/server/strategy/"
SERVERAPP = "adap/flower framework/py/flwr/serverapp/strategy/"
TFF = "google-parfait/tensorflow-federated tensorflow_federated/python/"
NVFLARE = "NVIDIA/NVFlare tests/unit_test/"
VECTORS: list[tuple[str, str, Any, Any, Sequence[int] | None, Any, dict[str, str]]] = [
    # source, rule, global model, clients' models, examples, result, parameters
    (f"{FLOWER}aggregate_test.py", "FedAvg", np.zeros((2, 3)), [A, A], [1, 2], A, {}),
    (f"{FLOWER}fedavgm_test.py", "FedAvgM", np.zeros((2, 3)), [A, A], [1, 2], A, {"momentum": "0"}),
    (f"{SERVERAPP}fedavgm_test.py", "FedAvgM", np.zeros((2, 3)), [A, B], [1, 2], (np.array(A) + 2 * np.array(B)) / 3,
     {"learningRate": "1.000000001", "momentum": "0"}),
    (f"{SERVERAPP}fedavgm_test.py, 0-d", "FedAvgM", 0.0, [1.0, 3.0], [1, 2], 7 / 3, {"momentum": "0"}),
    # The peer's result is 0.15, with an initial v of 0; in algorithm 2 of Reddi et al. it is tau squared.
    (f"{FLOWER}fedadagrad_test.py", "FedAdagrad", [0.1] * 4, [[0.2] * 4, [1.0] * 4], [5, 5],
     [0.1 + 0.1 * 0.5 / (math.sqrt(0.5) + 0.5)] * 4, {"learningRate": "0.1", "tau": "0.5"}),
    (f"{FLOWER}fedmedian_test.py", "CoordinateMedian", [0.1] * 4, [[0.2] * 4, [1.0] * 4, [0.5] * 4], None,
     [0.5] * 4, {}),
    (f"{SERVERAPP}fedmedian_test.py", "CoordinateMedian", [0.0] * 4,
     [[1, 0.2, 0.5, 1], [0.2, 0.5, 1, 0.2], [0.5, 1, 0.2, 0.5]], [5, 2, 9], [0.5] * 4, {}),
    (f"{SERVERAPP}fedmedian_test.py, 0-d", "CoordinateMedian", 0.0, [1.0, 3.0, 2.0], None, 2.0, {}),
    (f"{FLOWER}krum_test.py", "Krum", [0.1] * 4, [[0.2] * 4, [0.7] * 4, [1.0] * 4], None, [0.7] * 4,
     {"byzantine": "1"}),
    (f"{FLOWER}multikrum_test.py", "MultiKrum", [0.1] * 4, [[0.2] * 4, [0.5] * 4, [1.0] * 4], None, [0.35] * 4,
     {"byzantine": "1", "keep": "2"}),
    (f"{FLOWER}fedtrimmedavg_test.py", "TrimmedMean", [0.0] * 4,
     [[0.5] * 4, [1, 0.2, 0.5, 1], [0.2, 0.5, 1, 0.2], [0.5, 1, 0.2, 0.5]], None, [0.5] * 4, {"trim": "0.25"}),
    (f"{FLOWER}fedtrimmedavg_test.py, 0-d", "TrimmedMean", 0.0, [0.5, 1.0, 2.0, 100.0], None, 1.5, {"trim": "0.25"}),
    (f"{TFF}aggregators/mean_test.py", "FedAvg", 0.0, [1.0, 2.0, 3.0], [3, 2, 1], 10 / 6, {}),
    (f"{TFF}aggregators/mean_test.py, structure", "FedAvg", [0.0] * 3, [[1, 2, 3], [2, 5, 4], [3, 0, 5]], [3, 2, 1],
     [10 / 6, 16 / 6, 22 / 6], {}),
    (f"{NVFLARE}app_common/aggregators/in_time_accumulate_weighted_aggregator_test.py", "FedAvg", [0.0] * 4,
     [[2.0, 3.0, 1.1, 0.1], [1.0, 1.0, 2.1, 0.5]], [2, 4], [8 / 6, 10 / 6, 10.6 / 6, 2.2 / 6], {}),
    ("VectorInstitute/FL4Health tests/strategies/test_aggregate_utils.py", "FedAvg", np.zeros((2, 2, 2)), HEALTH,
     [3, 2, 1],
     np.where(np.arange(8).reshape(2, 2, 2) == 0, 17 / 3, 7 / 6), {}),
    ("VectorInstitute/FL4Health tests/strategies/test_scaffold.py", "SCAFFOLD", [6.0], [[46.0]], None, [16.0],
     {"learningRate": "0.25"}),
    ("LPD-EPFL/byzfl tests/unit_test_aggregators.py, average", "FedAvg", [0.0] * 3, BYZFL, None, [4, 5, 6], {}),
    ("LPD-EPFL/byzfl, median", "CoordinateMedian", [0.0] * 3, BYZFL, None, [4, 5, 6], {}),
    ("LPD-EPFL/byzfl, trimmed mean of 1", "TrimmedMean", [0.0] * 3, BYZFL, None, [4, 5, 6], {"trim": "0.34"}),
    ("LPD-EPFL/byzfl, Krum of 1", "Krum", [0.0] * 3, BYZFL, None, [1, 2, 3], {"byzantine": "1"}),
    ("LPD-EPFL/byzfl, MultiKrum of 1", "MultiKrum", [0.0] * 3, BYZFL, None, [2.5, 3.5, 4.5], {"byzantine": "1"}),
    # The peer stops after three iterations, at 3.788; on a line the result is the middle point.
    ("LPD-EPFL/byzfl, geometric median", "GeometricMedian", [0.0] * 3, BYZFL, None, [4, 5, 6], {}),
    ("lishenghui/blades, median", "CoordinateMedian", [0.0] * 3, BLADES, None, [1.5, 2, 3], {}),
    ("lishenghui/blades, mean", "FedAvg", [0.0] * 3, BLADES, None, [1.25, 2.25, 2], {}),
    ("lishenghui/blades, trimmed mean of 1", "TrimmedMean", [0.0] * 3, BLADES, None, [1.5, 2, 3], {"trim": "0.25"}),
    ("Gavinkaa/ByzML-GenBenefit, MultiKrum of 1", "MultiKrum", [0.0] * 6, BYZML, None, BYZML[1], {"byzantine": "1"}),
    ("the Fermat point of a right triangle", "GeometricMedian", [0.0, 0.0], [[0, 0], [1, 0], [0, 1]], None,
     [FERMAT] * 2, {}),
    ("xaynetwork/xaynet tests/aggregate_test.py", "FedAvg", [0.0] * 3, [[1, 2, 3], [2, 3, 1], [3, 1, 2]], None,
     [2] * 3, {}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vector", VECTORS, ids=[f"{vector[1]}: {vector[0]}" for vector in VECTORS])
def test_one_round(vector: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    _, rule, start, clients, examples, expected, parameters = vector
    strategy = make(rule, tmp_path, len(clients), **parameters)
    updates = [
        Update(
            f"c{number}",
            (examples or [1] * len(clients))[number],
            {"w": tensor(values, dtype)},
            scalars={"travel": 1.0},
        )
        for number, values in enumerate(clients)
    ]
    result = run(strategy, {"w": tensor(start, dtype)}, updates)["w"]
    torch.testing.assert_close(result, tensor(expected, dtype), rtol=1e-5, atol=1e-6)


def tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(np.asarray(values, dtype=np.float64), dtype=dtype)


def course(rule: str, gradient: float, rounds: int, start: float = 1.0, **parameters: Any) -> list[float]:
    """Return a weight after rounds of a client whose change is minus ``gradient``."""
    strategy, course = make(rule, **parameters), [start]
    for _ in range(rounds):
        base = {"w": torch.tensor([course[-1]], dtype=torch.float64)}
        course.append(float(run(strategy, base, [Update("c", 1, {"w": base["w"] - gradient})])["w"]))
    return course


ADAM: dict[str, Any] = {"learningRate": "0.1", "beta1": "0.9", "beta2": "0.999", "tau": "1e-12"}


@pytest.mark.parametrize(
    ("rule", "parameters", "expected"),
    [
        ("FedAvgM", {"learningRate": "0.01", "momentum": "0"}, [1, 0.98, 0.96, 0.94, 0.92]),
        ("FedAvgM", {"learningRate": "0.01", "momentum": "0.5"}, [1, 0.98, 0.95, 0.915, 0.8775]),
        ("FedAdagrad", {"learningRate": "0.01", "tau": "1e-12"}, [1, 0.99, 0.9829289, 0.9771554, 0.9721554]),
    ],
)
def test_optimizers_of_tensorflow_federated(rule: str, parameters: dict[str, Any], expected: list[float]) -> None:
    """learning/optimizers/{sgdm,adagrad}_test.py, test_math."""
    assert course(rule, 2.0, 4, **parameters) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rule", ["FedAdam", "FedYogi"])
def test_adam_and_yogi_of_tensorflow_federated_without_the_correction(rule: str) -> None:
    """learning/optimizers/{adam,yogi}_test.py, test_math: with the bias corrected, 0.9, 0.8, 0.7 and 0.6."""
    weight, m, v, expected = 1.0, 0.0, 1e-24, [1.0]
    for _ in range(4):
        m = 0.9 * m + 0.1 * 2.0
        v = 0.999 * v + 0.001 * 4.0 if rule == "FedAdam" else v - 0.001 * 4.0 * math.copysign(1.0, v - 4.0)
        weight -= 0.1 * m / (math.sqrt(v) + 1e-12)
        expected.append(weight)
    own = course(rule, 2.0, 4, **ADAM)
    assert own == pytest.approx(expected, abs=1e-6)
    assert [round(value, 2) for value in own] == [1.0, 0.68, 0.26, -0.24, -0.78]


@pytest.mark.parametrize("rule", ["FedAdagrad", "FedAdam", "FedYogi"])
def test_optimizers_of_tensorflow_federated_without_memory(rule: str) -> None:
    """learning/optimizers/{adagrad,adam,yogi}_test.py, test_match_keras with indexed slices."""
    betas: dict[str, Any] = {} if rule == "FedAdagrad" else {"beta1": "0", "beta2": "0"}
    assert course(rule, 1.0, 1, learningRate="0.5", tau="1e-7", **betas) == pytest.approx([1.0, 0.5], abs=1e-6)


def test_what_the_docs_say_of_flowers_fedadam() -> None:
    """adap/flower server/strategy/fedadam.py: v begins at 0, and the rate is corrected by round + 1."""
    rate, beta1, beta2, tau = 0.1, 0.9, 0.99, 1e-3
    m = v = peer = 0.0
    for number in range(1, 5):
        m, v = beta1 * m + (1 - beta1) * 0.01, beta2 * v + (1 - beta2) * 0.01**2
        corrected = rate * math.sqrt(1 - beta2 ** (number + 1)) / (1 - beta1 ** (number + 1))
        peer += corrected * m / (math.sqrt(v) + tau)
    own = course("FedAdam", -0.01, 4, start=0.0, learningRate="0.1")[-1]
    docs = (Path(__file__).parents[4] / "docs" / "training" / "strategies.md").read_text(encoding="utf-8")
    assert f"comes to {own:.3f} here and to {peer:.3f} in Flower" in docs


def test_control_variates_of_nvflare() -> None:
    """NVIDIA/NVFlare tests/unit_test/app_opt/pt/scaffold_test.py: c = 2, a client's 0.5, rate 0.1: c becomes -1.5."""
    strategy = make("SCAFFOLD")
    strategy.load_state({"SCAFFOLD.c/w": torch.tensor([2.0])})
    run(strategy, {"w": torch.tensor([1.0])}, [Update("c", 1, {"w": torch.tensor([1.15])}, scalars={"travel": 0.1})])
    assert strategy.companion()["w"].item() == pytest.approx(-1.5)


def test_control_variates_of_fl4health() -> None:
    """VectorInstitute/FL4Health tests/strategies/test_scaffold.py: half of the clients, a mean of 20, c = 10."""
    strategy = make("SCAFFOLD", clients=2)
    run(strategy, {"w": torch.tensor([0.0])}, [Update("c", 1, {"w": torch.tensor([-20.0])}, scalars={"travel": 1.0})])
    assert strategy.companion()["w"].item() == pytest.approx(10.0)


def test_asynchronous_steps_of_flsim() -> None:
    """facebookresearch/FLSim optimizers/tests/test_async_aggregator.py: random models and weights."""
    dice = np.random.default_rng(0)
    for _ in range(50):
        local, present, weight = map(float, dice.random(3))
        base = {"w": torch.tensor([present], dtype=torch.float64)}
        mixed = run(make("FedAsync", mixing=repr(weight)), base, [Update("c", 1, {"w": base["w"] * 0 + local})])
        assert mixed["w"].item() == pytest.approx((1 - weight) * present + weight * local)
        moved = {"w": base["w"] + local - 1}
        result = run(make("FedBuff", bufferSize="1"), base, [Update("c", 1, moved, discount=weight)])
        assert result["w"].item() == pytest.approx(present + weight * (local - 1))
