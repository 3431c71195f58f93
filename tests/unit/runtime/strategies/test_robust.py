"""Robust rules compared with NumPy over all updates at once, with wrong updates among them, and in small blocks."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.strategies import Setup, Update, spill
from isthmus.strategies.robust.krum import Krum
from isthmus.tensors import State

from .rounds import array, make, model, run, updates

RULES = ["CoordinateMedian", "TrimmedMean", "Krum", "MultiKrum", "GeometricMedian"]
Arrays = dict[str, np.ndarray]


def stacked(contributions: list[Update]) -> Arrays:
    return {
        name: np.stack([array(update.tensors[name]) for update in contributions]) for name in contributions[0].tensors
    }


def flat(values: Arrays) -> np.ndarray:
    """Return the values over which distances are computed: a row per client, floating-point tensors only."""
    return np.concatenate([values[name].reshape(len(values[name]), -1) for name in ("w", "b")], axis=1)


def krum_order(values: Arrays, byzantine: int) -> list[int]:
    points = flat(values)
    scores = []
    for one in range(len(points)):
        others = sorted(float(np.sum((points[one] - points[k]) ** 2)) for k in range(len(points)) if k != one)
        scores.append(sum(others[: len(points) - byzantine - 2]))
    return sorted(range(len(points)), key=scores.__getitem__)


def mean_of(values: Arrays, chosen: list[int]) -> Arrays:
    return {name: value[chosen].mean(axis=0) for name, value in values.items()}


def geometric_median(values: Arrays) -> Arrays:
    points = flat(values)
    point = points.mean(axis=0)
    for _ in range(2000):
        weights = 1 / np.maximum(np.linalg.norm(points - point, axis=1), 1e-6)
        weights /= weights.sum()
        point = weights @ points
    return {name: np.tensordot(weights, value, axes=1) for name, value in values.items()}


def expected(rule: str, values: Arrays) -> Arrays:
    count = len(values["w"])
    match rule:
        case "CoordinateMedian":
            return {name: np.median(value, axis=0) for name, value in values.items()}
        case "TrimmedMean":
            cut = int(0.1 * count)
            return {name: np.sort(value, axis=0)[cut : count - cut].mean(axis=0) for name, value in values.items()}
        case "Krum":
            return mean_of(values, krum_order(values, 1)[:1])
        case "MultiKrum":
            return mean_of(values, krum_order(values, 1)[: count - 1])
    return geometric_median(values)


def with_a_liar(base: State, count: int) -> list[Update]:
    contributions = updates(base, count, seed=3)
    wrong = {name: tensor * 1000 if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    return [*contributions[:-1], replace(contributions[-1], num_examples=10**9, tensors=wrong)]


@pytest.mark.parametrize(("rule", "count", "block"), list(itertools.product(RULES, [5, 12], [1 << 20, 100])))
def test_as_in_the_paper(rule: str, count: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "BLOCK_BYTES", block)
    base = model()
    contributions = with_a_liar(base, count)
    result = run(make(rule, tmp_path), base, contributions)
    values = stacked(contributions)
    wanted = expected(rule, values)
    if rule in ("Krum", "MultiKrum", "GeometricMedian"):
        wanted["seen"] = np.median(values["seen"], axis=0)  # it does not enter the distances
    for name, value in wanted.items():
        assert (result[name].dtype, result[name].shape) == (base[name].dtype, base[name].shape)
        rounded = value if base[name].is_floating_point() else np.round(value)
        np.testing.assert_allclose(array(result[name]), rounded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_liar_is_withstood(rule: str, tmp_path: Path) -> None:
    base = model()
    result = run(make(rule, tmp_path), base, with_a_liar(base, 11))
    assert (result["w"] - base["w"]).abs().max() < 1.5


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_arrival_does_not_matter(rule: str, tmp_path: Path) -> None:
    base = model()
    contributions = updates(base, 7, seed=1)
    there, back = (run(make(rule, tmp_path), base, some) for some in (contributions, contributions[::-1]))
    assert all(torch.equal(there[name], back[name]) for name in base)


def test_one_update_is_the_result(tmp_path: Path) -> None:
    base = model()
    contributions = updates(base, 1, seed=1)
    for rule in RULES:
        result = run(make(rule, tmp_path), base, contributions)
        assert all(torch.equal(result[name], contributions[0].tensors[name]) for name in base)


def test_nothing_stays_on_disk(tmp_path: Path) -> None:
    base = model()
    strategy = make("CoordinateMedian", tmp_path)
    strategy.begin(base)
    for update in updates(base, 3, seed=1):
        strategy.accept(update)
        assert list(tmp_path.iterdir()) == []  # the file has no name, so a crash leaves nothing behind
    strategy.finish()
    assert run(strategy, base, updates(base, 2, seed=2)) is not None


def test_a_failed_write_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = model()
    contributions = updates(base, 3, seed=1)
    strategy = make("CoordinateMedian", tmp_path)
    strategy.begin(base)
    strategy.accept(contributions[0])
    with monkeypatch.context() as broken:
        broken.setattr("os.pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            strategy.accept(contributions[1])
    for update in contributions[1:]:
        strategy.accept(update)
    result = strategy.finish()
    assert torch.equal(result["w"], run(make("CoordinateMedian", tmp_path), base, contributions)["w"])


def test_statistics_have_no_say_in_distances(tmp_path: Path) -> None:
    base = {"w": torch.zeros(4), "var": torch.zeros(4)}
    contributions = []
    for number in range(5):
        # Client 0 is in the middle by its weights, but far from the others by its statistics.
        weights, statistics = torch.full((4,), 0.1 * number * (-1) ** number), torch.full((4,), 1e6 * (number == 0))
        update = Update(f"p/{number}", 1, {"w": weights, "var": statistics}, frozenset({"var"}))
        contributions.append(update)
    assert run(make("Krum", tmp_path), base, contributions)["w"].tolist() == [0.0] * 4


@pytest.mark.parametrize("rule", RULES)
def test_statistics_and_counters_of_a_liar_are_withstood(rule: str, tmp_path: Path) -> None:
    # Its weights are the global ones, which are the closest to all others, so Krum selects it.
    dice = torch.Generator().manual_seed(0)
    base: State = {"w": torch.zeros(1000), "mean": torch.zeros(4), "var": torch.ones(4), "n": torch.tensor(100)}
    base["flag"] = torch.tensor([True, False])
    buffers = frozenset({"mean", "var", "n", "flag"})
    states: list[State] = [
        {
            "w": 0.01 * torch.randn(1000, generator=dice), "mean": 0.1 * torch.randn(4, generator=dice),
            "var": torch.full((4,), 1 + 0.1 * number), "n": torch.tensor(110), "flag": base["flag"],
        }
        for number in range(9)
    ]  # fmt: skip
    lie = torch.full((4,), 1e9)
    states.append({"w": base["w"], "mean": lie, "var": -lie, "n": torch.tensor(2**62), "flag": ~base["flag"]})
    result = run(make(rule, tmp_path), base, [Update(f"p/{n}", 1, state, buffers) for n, state in enumerate(states)])
    assert result["mean"].abs().max() < 0.5
    assert bool(((result["var"] >= 1) & (result["var"] <= 1.8)).all())
    assert result["n"].item() == 110
    assert torch.equal(result["flag"], base["flag"])


@pytest.mark.parametrize("size", [1.0, 1e3, 1e7, 1e12, 2.0**60])
@pytest.mark.parametrize("attack", ["one weight", "noise", "together", "the same"])
@pytest.mark.parametrize(("count", "liars"), [(5, 2), (10, 1), (10, 4), (31, 15)])
def test_the_geometric_median_keeps_its_bound(count: int, liars: int, attack: str, size: float, tmp_path: Path) -> None:
    """The result is within 2 (n - f) / (n - 2 f) times the largest distance of an honest update from any point.

    Pillutla, Kakade and Harchaoui (2022), lemma 2, after Lopuhaa and Rousseeuw (1991)."""
    dice = torch.Generator().manual_seed(count)
    base = 0.05 * torch.randn(500, generator=dice)
    spread = 0.0 if attack == "the same" else 1e-3
    honest = [base + 0.01 + spread * torch.randn(500, generator=dice) for _ in range(count - liars)]
    direction = torch.randn(500, generator=dice)
    wrong = []
    for _ in range(liars):
        far = direction if attack == "together" else torch.randn(500, generator=dice)
        if attack == "one weight":
            far = torch.eye(1, 500)[0]
        wrong.append((base + far / far.abs().max() * size).clamp(-(2.0**60), 2.0**60))
    updates = [Update(f"p/{number:02}", 1, {"w": w}) for number, w in enumerate([*wrong, *honest])]
    result = run(make("GeometricMedian", tmp_path), {"w": base}, updates)["w"]
    centre = torch.stack(honest).mean(dim=0)
    furthest = max(float((w - centre).norm()) for w in honest)
    bound = 2 * (count - liars) / (count - 2 * liars) * furthest
    assert float((result - centre).norm()) <= bound + 1e-5


def test_updates_that_are_nearly_the_same_have_distances() -> None:
    rule, base = Krum(Setup({"byzantine": 1.0})), {"w": torch.zeros(3, dtype=torch.float64)}
    rule.begin(base)
    for number in range(4):
        rule.accept(Update(f"p/{number}", 1, {"w": torch.tensor([1e9, number * 1e-6, 0.0], dtype=torch.float64)}))
    rule.accept(Update("p/4", 1, {"w": torch.tensor([2.0**60, 0.0, 0.0], dtype=torch.float64)}))
    distances = rule.squared_distances([0, 1, 2, 3, 4]).sqrt()
    torch.testing.assert_close(distances[0, :4], torch.arange(4) * 1e-6, rtol=1e-6, atol=0.0, check_dtype=False)
    assert torch.equal(distances, distances.T)


@pytest.mark.parametrize(
    ("trim", "count", "kept"), [("0.29", 100, 42), ("0.07", 100, 86), ("0.3", 10, 4), ("0.1", 9, 9)]
)
def test_the_trim_is_the_decimal_of_the_manifest(trim: str, count: int, kept: int, tmp_path: Path) -> None:
    base = {"w": torch.zeros(1, dtype=torch.float64)}
    weights = [1e6 * (number < (count - kept) // 2) + number for number in range(count)]
    updates = [Update(f"p/{n:03}", 1, {"w": torch.tensor([w], dtype=torch.float64)}) for n, w in enumerate(weights)]
    left = sorted(weights)[(count - kept) // 2 : (count + kept) // 2]
    assert run(make("TrimmedMean", tmp_path, trim=trim), base, updates)["w"].item() == pytest.approx(sum(left) / kept)


def test_memory_does_not_grow_with_the_clients(tmp_path: Path) -> None:
    base = {"w": torch.zeros(3_000_000)}
    strategy = make("TrimmedMean", tmp_path)
    strategy.begin(base)
    spread = torch.linspace(-1, 1, 3_000_000)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        pytest.skip("this system does not let a process measure its own peak")
    before = resident()
    for number in range(40):
        strategy.accept(Update(f"p/{number}", 1, {"w": spread * number}))
    strategy.finish()
    # 40 updates are 480 MB; the result is 12 MB, and a block and the memory for sorting are a few times 16 MiB.
    assert peak() - before < 200 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
