"""Noise of the clients: its size in the opened sum, and the layouts that a client refuses."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from isthmus.privacy import Adaptation, Private
from isthmus.secure_aggregation.encoding.scalars import LONG
from isthmus.secure_aggregation.fixed_point import Contribution, quantise
from isthmus.secure_aggregation.layout import Parameters, grid, make_layout, problem_with
from isthmus.secure_aggregation.sum_rule import ImplausibleSumError, SecureSum
from isthmus.strategies import Update, make_strategy
from isthmus.tensors import State
from isthmus_contracts.api.strategy import Strategy as Spec
from isthmus_contracts.pb import secure_aggregation_pb2 as pb

CLIP, NOISE, CLIENTS, FEWEST = 0.5, 2.0, 9, 6
SIZE = 60_000


def base() -> State:
    return {"w": torch.zeros(SIZE)}


def moved(length: float, seed: int) -> State:
    change = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
    return {"w": change * (length / float(change.norm()))}


def secure(adaptation: Adaptation | None = None, bits: int = 32, clients: int = CLIENTS) -> SecureSum:
    mechanism = Private(
        make_strategy(Spec()), CLIP, NOISE, clients, lambda count: pytest.fail("the aggregator adds noise"),
        adaptation, FEWEST,
    )  # fmt: skip
    return SecureSum(mechanism, Parameters(bits=bits, max_clients=clients, metrics={"loss": 100.0}, clip_norm=CLIP))


def opened(rule: SecureSum, lengths: list[float]) -> State:
    """Return the model after a round without masks."""
    model = base()
    layout = rule.arrange(model)
    rule.begin(model)
    for number, length in enumerate(lengths):
        sent = quantise(layout, model, moved(length, number), Contribution(1, metrics={"loss": 1.0}))
        rule.accept(Update(f"pool/{number}", 1, sent.tensors))
    rule.open()
    return rule.finish()


@pytest.mark.parametrize("survivors", [FEWEST, CLIENTS])
@pytest.mark.parametrize("bits", [32, 16])
def test_any_number_of_survivors_has_enough_noise(survivors: int, bits: int) -> None:
    """Empirical variance of the released sum, in the unit of the clipping norm."""
    released = opened(secure(bits=bits), [0.0] * survivors)["w"].double() * CLIENTS
    wanted = NOISE * CLIP * math.sqrt(survivors / FEWEST)
    assert float(released.std()) == pytest.approx(wanted, rel=0.015)
    assert abs(float(released.mean())) < 5 * wanted / math.sqrt(SIZE)
    assert stats.kstest(released.numpy() / wanted, "norm").pvalue > 1e-3


def test_the_sum_of_the_integers_is_a_skellam_variable() -> None:
    """Small enough a grid that the distribution of integers can be compared cell by cell."""
    noise = pb.SecureNoise(
        kind=pb.SecureNoise.SKELLAM, clip_norm=CLIP, noise_multiplier=NOISE, contributors=FEWEST
    )  # fmt: skip
    parameters = Parameters(bits=16, max_clients=1500, clip_norm=CLIP)
    layout = make_layout(parameters, base(), noise=noise)
    total = torch.zeros(SIZE, dtype=torch.int64)
    for _ in range(FEWEST):
        total += quantise(layout, base(), base(), Contribution(1)).tensors["w"]
    variance = grid(layout).variance
    assert variance < 2000
    reach = math.ceil(4 * math.sqrt(variance))
    values = np.arange(-reach, reach + 1)
    expected = special.ive(np.abs(values), variance)
    expected[[0, -1]] += (1 - expected.sum()) / 2
    found = np.bincount(np.clip(total.numpy(), -reach, reach) + reach, minlength=len(values))
    assert stats.chisquare(found, expected * SIZE, sum_check=False).pvalue > 1e-3


def test_two_roundings_of_one_update_have_different_noise() -> None:
    rule, model = secure(), base()
    layout = rule.arrange(model)
    one, other = (quantise(layout, model, moved(0.4, 1), Contribution(1)).tensors["w"] for _ in range(2))
    assert abs(float(np.corrcoef(one.double().numpy(), other.double().numpy())[0, 1])) < 0.05


def test_the_signal_is_there() -> None:
    """Without bias: the mean of many coordinates that all move alike."""
    rule, model = secure(), base()
    layout = rule.arrange(model)
    alike = {"w": torch.full((SIZE,), 0.4 / math.sqrt(SIZE))}
    rule.begin(model)
    for number in range(CLIENTS):
        rule.accept(Update(f"pool/{number}", 1, quantise(layout, model, alike, Contribution(1)).tensors))
    rule.open()
    mean = float(rule.finish()["w"].double().mean())
    noise = NOISE * CLIP * math.sqrt(CLIENTS / FEWEST) / CLIENTS / math.sqrt(SIZE)
    assert mean == pytest.approx(0.4 / math.sqrt(SIZE), abs=5 * noise)


def test_the_count_of_long_changes_is_noisy_too() -> None:
    adaptation = Adaptation(0.5, 0.2, 3.0, CLIENTS)
    counts = []
    for _ in range(150):
        rule = secure(adaptation)
        model = {"w": torch.zeros(4)}
        layout = rule.arrange(model)
        rule.begin(model)
        for number in range(FEWEST):
            change = {"w": torch.full((4,), 10.0 if number % 2 else 0.0)}
            rule.accept(Update(f"pool/{number}", 1, quantise(layout, model, change, Contribution(1)).tensors))
        counts.append(rule.open().scalars[LONG])
    assert float(np.std(counts)) == pytest.approx(3.0, rel=0.25)
    assert float(np.mean(counts)) == pytest.approx(FEWEST / 2, abs=1.2)


def test_the_norm_follows_the_noisy_count() -> None:
    adaptation = Adaptation(0.5, 0.2, 0.5 * NOISE * 1.01, CLIENTS)
    rule = secure(adaptation)
    mechanism = rule._rule
    assert isinstance(mechanism, Private)
    opened(rule, [10.0] * CLIENTS)
    noisy = rule.sums.scalars[LONG]
    share = 0.5 + (CLIENTS - noisy - CLIENTS / 2) / CLIENTS
    assert mechanism.next_clip_norm == pytest.approx(adaptation.next_norm(CLIP, share))
    layout = rule.arrange(base())
    assert layout.noise.clip_norm == mechanism.next_clip_norm
    assert layout.tensors[0].clip == mechanism.next_clip_norm


def test_a_count_far_beyond_its_noise_is_implausible() -> None:
    rule = secure(Adaptation(0.5, 0.2, 3.0, CLIENTS))
    model = base()
    layout = rule.arrange(model)
    rule.begin(model)
    sent = quantise(layout, model, base(), Contribution(1)).tensors
    place = [scalar.name for scalar in layout.scalars].index(LONG)
    sent["isthmus.scalars"][place] += 1000 << 40
    rule.accept(Update("pool/0", 1, sent))
    with pytest.raises(ImplausibleSumError):
        rule.open()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"noise_multiplier": math.nan}, "out of range"),
        ({"noise_multiplier": -1.0}, "out of range"),
        ({"clip_norm": math.inf}, "out of range"),
        ({"kind": pb.SecureNoise.DISCRETE_GAUSSIAN}, "kind"),
        ({"kind": pb.SecureNoise.KIND_UNSPECIFIED}, "kind"),
        ({"noise_multiplier": 0.0}, "kind"),
        ({"contributors": 1}, "more than one contributor"),
        ({"contributors": 10_000}, "more than one contributor"),
        ({"noise_multiplier": 1e11}, "no room"),
    ],
)
def test_a_client_refuses_noise_that_protects_nobody(change: dict[str, float], reason: str) -> None:
    layout = secure().arrange(base())
    assert problem_with(layout, base()) is None
    for name, value in change.items():
        setattr(layout.noise, name, value)
    problem = problem_with(layout, base())
    assert problem is not None and reason in problem
