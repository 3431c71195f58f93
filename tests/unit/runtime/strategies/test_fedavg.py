"""Strategies compared with independent arithmetic."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.client.corrections.proximal import ProximalTerm
from isthmus.client.state.parameter_names import ParameterNames
from isthmus.strategies import Update, make_strategy
from isthmus.tensors import State
from isthmus_contracts.api.strategy import Strategy as Spec


def aggregate(model: State, updates: list[tuple[int, State]]) -> State:
    strategy = make_strategy(Spec(algorithm="FedAvg"))
    strategy.begin(model)
    for number, (examples, tensors) in enumerate(updates):
        strategy.accept(Update(f"p/{number}", examples, tensors))
    return strategy.finish()


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=6), st.integers(0, 2**31))
@settings(max_examples=50)
def test_fedavg_is_the_weighted_mean(examples: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    states = [{"w": torch.randn(3, 4), "b": torch.randn(4, dtype=torch.float64)} for _ in examples]
    result = aggregate(states[0], list(zip(examples, states, strict=True)))
    for name in states[0]:
        stacked = torch.stack([state[name].double() for state in states])
        weights = torch.tensor(examples, dtype=torch.float64) / sum(examples)
        expected = torch.einsum("c...,c->...", stacked, weights)
        assert result[name].dtype == states[0][name].dtype
        torch.testing.assert_close(result[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_is_summed_in_single() -> None:
    # 2048 + 1 is not representable in float16: a float16 sum of these would lose every small term.
    states = [{"w": torch.tensor([1.0], dtype=torch.float16)} for _ in range(4096)]
    result = aggregate(states[0], [(1, state) for state in states])
    assert result["w"].dtype == torch.float16
    assert result["w"].item() == 1.0


def test_counters_are_rounded_means() -> None:
    states: list[tuple[int, State]] = [(1, {"n": torch.tensor(10)}), (3, {"n": torch.tensor(20)})]
    result = aggregate(states[0][1], states)
    assert result["n"].dtype == torch.int64
    assert result["n"].item() == 18  # 17.5, rounded to even


def test_rounds_do_not_leak_into_each_other() -> None:
    strategy = make_strategy(Spec(algorithm="FedProx"))
    model = {"w": torch.zeros(2)}
    for value in (1.0, 5.0):
        strategy.begin(model)
        strategy.accept(Update("p/0", 7, {"w": torch.full((2,), value)}))
        assert strategy.finish()["w"].tolist() == [value, value]


def test_the_proximal_term_is_the_gradient_of_its_penalty() -> None:
    torch.manual_seed(0)
    mu, steps, rate = 0.7, 5, 0.1
    start = torch.randn(6)
    target = torch.randn(6)

    wrapped = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([wrapped], lr=rate, momentum=0.9)
    ProximalTerm(mu, ParameterNames({"w": wrapped})).attach(optimizer)
    plain = torch.nn.Parameter(start.clone())
    reference = torch.optim.SGD([plain], lr=rate, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (wrapped - target).square().sum().backward()
        optimizer.step()
        reference.zero_grad()
        ((plain - target).square().sum() + mu / 2 * (plain - start).square().sum()).backward()
        reference.step()
    torch.testing.assert_close(wrapped, plain)
