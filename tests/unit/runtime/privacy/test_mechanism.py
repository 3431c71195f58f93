"""Effects of one client and of noise on a round."""

import math
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus.privacy import Private
from isthmus.privacy.noise import Normals
from isthmus.strategies import StrategyError, Update, make_strategy
from isthmus.tensors import State
from isthmus_contracts.api.strategy import Strategy as Spec

STEPS = 2**32


def silent(count: int) -> Normals:
    return np.zeros(count)


def private(
    clip_norm: float = 1.0, noise: float = 1.0, clients: int = 2, algorithm: str = "FedAvg",
    normals: Callable[[int], Normals] = silent, **parameters: str,
) -> Private:  # fmt: skip
    rule = make_strategy(Spec.model_validate({"algorithm": algorithm, "parameters": parameters}))
    return Private(rule, clip_norm, noise, clients, normals)


def model() -> State:
    torch.manual_seed(0)
    return {
        "w": torch.randn(300, 50),
        "h": torch.randn(7).half(),
        "b": torch.randn(5, dtype=torch.bfloat16),
        "d": torch.randn(3, dtype=torch.float64),
        "e": torch.empty(0),
        "s": torch.tensor(0.5),
        "n": torch.tensor(10),
    }


def moved(base: State, by: float, seed: int = 1, client: str = "pool/0", examples: int = 1) -> Update:
    """Return an update whose change has about the given L2 norm."""
    torch.manual_seed(seed)
    change = {name: torch.randn(t.shape, dtype=torch.float64) for name, t in base.items() if t.is_floating_point()}
    length = math.sqrt(sum(float(tensor.square().sum()) for tensor in change.values()))
    tensors = {
        name: (tensor.double() + change[name] * (by / length)).to(tensor.dtype) if name in change else tensor + 7
        for name, tensor in base.items()
    }
    return Update(client, examples, tensors)


def sums(strategy: Private) -> list[int]:
    """Return the exact sum of a round before noise, in steps."""
    return [value for total in strategy._sums.values() for value in total.tolist()]


def difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the exact squared L2 distance, in steps."""
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


def run(strategy: Private, base: State, updates: Sequence[Update]) -> State:
    strategy.begin(base)
    for update in updates:
        strategy.accept(update)
    return {name: tensor.clone() for name, tensor in strategy.finish().items()}  # the rule reuses its memory


def two_tensors(values: np.ndarray) -> State:
    return {"v": torch.from_numpy(values[:8].copy()), "u": torch.from_numpy(values[8:].copy())}


hostile = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 3.4e38, -3.4e38, 1e-45, 1.0, -1.0, 1 + 2**-23]),
)


@given(
    st.lists(hnp.arrays(np.float32, 12, elements=hostile), min_size=1, max_size=6),
    hnp.arrays(np.float32, 12, elements=hostile),
    st.floats(1e-3, 1e3),
)
@settings(max_examples=300)
def test_no_client_moves_the_sum_by_more_than_the_bound(
    clients: list[np.ndarray], base: np.ndarray, clip_norm: float
) -> None:
    """Sensitivity in exact integer arithmetic, for any client that is left out and any update of it."""
    weights = two_tensors(base)
    updates = [Update(f"pool/{number}", number + 1, two_tensors(one)) for number, one in enumerate(clients)]
    strategy = private(clip_norm)

    def total(of: Sequence[Update]) -> list[int]:
        strategy.begin(weights)
        for update in of:
            strategy.accept(update)
        return sums(strategy)

    everybody = total(updates)
    assert total(updates[::-1]) == everybody  # in any order
    for left_out in range(len(updates)):
        assert difference(everybody, total(updates[:left_out] + updates[left_out + 1 :])) <= STEPS**2


def test_doubles_that_overflow_count_for_nothing() -> None:
    base = {"d": torch.zeros(3, dtype=torch.float64)}
    strategy = private()
    strategy.begin({"d": torch.full((3,), -1.5e308, dtype=torch.float64)})
    strategy.accept(Update("pool/0", 1, {"d": torch.full((3,), 1.5e308, dtype=torch.float64)}))
    assert sums(strategy) == [0, 0, 0]
    strategy.begin(base)
    strategy.accept(Update("pool/0", 1, {"d": torch.full((3,), 1e300, dtype=torch.float64)}))
    assert sums(strategy) == [0, 0, 0]
    assert strategy.clipped_ratio == 1.0


@pytest.mark.parametrize("length", [0.5, 3.0, 1e4])
def test_a_change_is_scaled_down_to_the_bound_and_keeps_its_direction(length: float) -> None:
    base = model()
    update = moved(base, length)
    result = run(private(clip_norm=1.0, clients=1), base, [update])
    changes = {name: update.tensors[name].double() - base[name].double() for name in ("w", "d", "s", "h", "b")}
    norm = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
    for name in ("w", "d", "s"):  # half precision is too coarse for this comparison
        torch.testing.assert_close(
            result[name].double() - base[name].double(), changes[name] * min(1.0, 1.0 / norm), rtol=0, atol=5e-7
        )
    assert {name: tensor.dtype for name, tensor in result.items()} == {name: t.dtype for name, t in base.items()}
    assert result["n"] == base["n"]  # integers keep their value, whatever a client sends


def test_examples_do_not_count_and_the_denominator_is_fixed() -> None:
    base = {"w": torch.zeros(4)}
    one = Update("pool/0", 1_000_000, {"w": torch.tensor([0.5, 0.0, 0.0, 0.0])})
    other = Update("pool/1", 1, {"w": torch.tensor([0.0, 0.5, 0.0, 0.0])})
    assert run(private(clients=4), base, [one, other])["w"].tolist() == [0.125, 0.125, 0.0, 0.0]


def test_a_trained_tensor_gets_noise_even_if_one_client_calls_it_a_buffer() -> None:
    base = {"w": torch.zeros(2), "freqs": torch.ones(2)}
    drawn: list[int] = []

    def ones(count: int) -> Normals:
        drawn.append(count)
        return np.ones(count)

    honest = Update("pool/0", 1, {"w": torch.ones(2), "freqs": torch.ones(2)}, frozenset({"freqs"}))
    liar = Update("pool/1", 1, {"w": torch.ones(2), "freqs": torch.full((2,), 9.0)}, frozenset({"freqs", "w"}))
    result = run(private(normals=ones), base, [honest, liar])
    assert drawn == [2]
    assert torch.equal(result["freqs"], base["freqs"])
    assert (result["w"] > 0.5).all()
    drawn.clear()
    run(private(normals=ones), base, [liar, replace(honest, buffers=frozenset())])
    assert drawn == [2, 2]


def test_the_noise_has_the_size_that_was_asked_for() -> None:
    base = {"w": torch.zeros(200_000)}
    result = run(
        private(clip_norm=0.5, noise=3.0, clients=10, normals=np.random.default_rng(1).standard_normal),
        base, [Update("pool/0", 1, {"w": torch.zeros(200_000)})],
    )  # fmt: skip
    assert float(result["w"].std()) == pytest.approx(3.0 * 0.5 / 10, rel=0.01)
    assert abs(float(result["w"].mean())) < 0.002


def test_a_round_that_is_done_again_draws_other_noise() -> None:
    base = model()
    strategies = [Private(make_strategy(Spec()), 1.0, 1.0, 2) for _ in range(2)]
    results = [run(strategy, base, [moved(base, 0.5)]) for strategy in strategies]
    results.append(run(strategies[0], base, [moved(base, 0.5)]))
    assert all(not torch.equal(results[a]["w"], results[b]["w"]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("algorithm", ["FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"])
def test_a_server_optimizer_sees_the_noisy_mean_alone(algorithm: str) -> None:
    """The rule receives one update, and keeps its memory."""
    base = model()
    plain, protected = make_strategy(Spec(algorithm=algorithm)), private(1.0, clients=2, algorithm=algorithm)  # type: ignore[arg-type]
    state = base
    for seed in range(3):
        updates = [moved(state, 0.4, seed), moved(state, 2.0, seed + 10)]
        mean = run(private(1.0, clients=2), state, updates)
        plain.begin(state)
        plain.accept(Update("all", 1, mean))
        expected = plain.finish()
        state = run(protected, state, updates)
        for name in ("w", "d", "s"):
            torch.testing.assert_close(state[name], expected[name], rtol=1e-4, atol=1e-6)
    assert protected.state().keys() == plain.state().keys() != set()
    fresh = private(1.0, clients=2, algorithm=algorithm)
    fresh.load_state(protected.state())
    assert fresh.state().keys() == protected.state().keys()


def test_batch_norm_is_refused_by_name() -> None:
    names = ("weight", "running_mean", "running_var")
    state = {f"{number}.{name}": torch.ones(2) for number in (1, 4) for name in names}
    with pytest.raises(StrategyError) as error:
        private().begin(state)
    assert str(error.value) == (
        "spec.privacy.differentialPrivacy: the model holds statistics of its clients' data (1.running_mean,"
        " 1.running_var, 4.running_mean, …), which noise would make useless; use GroupNorm or LayerNorm"
        " instead"
    )


def test_the_share_of_clipped_updates() -> None:
    base = model()
    strategy = private(1.0)
    strategy.begin(base)
    for length in (0.1, 0.5, 4.0, 0.9):
        strategy.accept(moved(base, length))
    assert strategy.clipped_ratio == 0.25
    strategy.begin(base)
    assert strategy.clipped_ratio == 0.0


def test_memory_does_not_grow_with_the_clients() -> None:
    base = {"w": torch.zeros(3_000_000)}
    update = Update("pool/0", 1, {"w": torch.ones(3_000_000)})
    strategy = Private(make_strategy(Spec()), 1.0, 1.0, 2)
    run(strategy, base, [update])  # allocates the sums, which are kept
    tracemalloc.start()  # sees numpy's memory
    run(strategy, base, [update] * 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20  # noise is drawn in blocks, not for the whole model at once
