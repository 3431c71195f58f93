"""Results of rules over secure sums, beside those over the single updates."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from isthmus.privacy import Private
from isthmus.secure_aggregation.fixed_point import Contribution, quantisation_bound, quantise
from isthmus.secure_aggregation.layout import Parameters, levels, public_seed, wire_specs
from isthmus.secure_aggregation.primitives.masks import add_masks
from isthmus.secure_aggregation.sum_rule import ImplausibleSumError, SecureSum
from isthmus.strategies import StrategyError, Update
from isthmus.tensors import State, allocate
from isthmus_contracts.pb import secure_aggregation_pb2 as pb

from .secure_rounds import BUFFERS, model, plain_round, rule, secure, secure_round, trained

CLIENTS = 5
# Largest ratio of the error of a rule's result to that of the mean change, over four rounds: with momentum 0.9 errors
# add up; an adaptive step has the slope learningRate / tau, and v remembers the errors as well.
AMPLIFICATION = {
    "FedAvg": 1.0, "FedProx": 1.0, "FedAvgM": 10.0, "FedAdagrad": 400.0, "FedAdam": 40.0, "FedYogi": 40.0,
    "FedNova": 30.0, "SCAFFOLD": 1.0,
}  # fmt: skip


def compare(result: State, expected: State, bounds: dict[str, float], factor: float = 1.0) -> None:
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (result[name].dtype, result[name].shape) == (tensor.dtype, tensor.shape)
        if not tensor.is_floating_point() or name == "frozen":
            assert torch.equal(result[name], tensor), name
        elif tensor.numel():
            error = float((result[name].double() - tensor.double()).abs().max())
            rounding = 4 * torch.finfo(tensor.dtype).eps * float(tensor.abs().max())
            assert error <= factor * bounds[name] + rounding, name


@pytest.mark.parametrize("algorithm", AMPLIFICATION)
def test_a_rule_makes_of_the_sum_what_it_makes_of_the_updates(algorithm: str) -> None:
    plain, hidden = rule(algorithm, CLIENTS), secure(algorithm, CLIENTS, max_examples=3000)
    base = model()
    for number in range(4):
        # As many clients as there may be, and then fewer: SCAFFOLD depends on their share.
        updates = trained(base, CLIENTS - number % 2, seed=number)
        expected = plain_round(plain, base, updates)
        result = secure_round(hidden, base, updates, ["frozen"])
        weight = sum(update.weight for update in updates)
        assert hidden.sums.weight == weight
        assert hidden.sums.clipped_share == 0
        assert hidden.sums.metrics["loss"].mean == pytest.approx(1.0, abs=1e-6)
        bounds = quantisation_bound(hidden.layout, len(updates), weight)
        assert max(bounds.values()) < (1e-2 if number == 0 else 1e-3)
        compare(result, expected, bounds, AMPLIFICATION[algorithm])
        for name, control in plain.companion().items():
            trains = name not in BUFFERS and control.is_floating_point() and control.numel() and name != "frozen"
            bound = bounds[f"slope/{name}"] if trains else 0.0
            error = (hidden.companion()[name].double() - control.double()).abs()
            assert not control.numel() or float(error.max()) <= 4 * bound + 1e-5 * float(control.abs().max()), name
        base = expected


@pytest.mark.parametrize(
    "settings",
    [{"bits": 16, "max_examples": 3000}, {"rotation": True}, {"bits": 16, "rotation": True, "max_examples": 3000}],
)
def test_the_bound_holds_for_every_form_of_the_coordinates(settings: dict[str, object]) -> None:
    plain, hidden = rule("FedAvg", CLIENTS), secure("FedAvg", CLIENTS, **settings)
    base = model()
    for number in range(3):
        updates = trained(base, CLIENTS, seed=number)
        expected = plain_round(plain, base, updates)
        result = secure_round(hidden, base, updates, ["frozen"], seed=public_seed("job", number))
        bounds = quantisation_bound(hidden.layout, CLIENTS, sum(update.weight for update in updates))
        compare(result, expected, bounds)
        base = expected


def test_kept_coordinates_move_and_the_others_rest() -> None:
    base = {"w": torch.zeros(5000), "b": torch.zeros(10)}
    moved = {name: torch.full_like(tensor, 0.25) for name, tensor in base.items()}
    hidden = secure("FedAvg", 3, keep=0.25, max_examples=10)
    seen = torch.zeros(5000, dtype=torch.bool)
    for number in range(8):
        updates = [Update(f"pool/{index}", 10, moved) for index in range(3)]
        result = secure_round(hidden, base, updates, seed=public_seed("job", number))
        torch.testing.assert_close(result["b"], moved["b"])
        kept = result["w"] != 0
        assert int(kept.sum()) == 1250
        torch.testing.assert_close(result["w"][kept], moved["w"][kept])
        seen |= kept
    assert 0.85 < float(seen.float().mean()) < 0.95  # 1 - 0.75^8 = 0.9


def test_unchanged_coordinates_keep_their_bits() -> None:
    base = {"w": torch.tensor([0.0, -0.0, 1e-45, -3e38, 0.1]), "h": torch.tensor([-0.0, 6e-8]).half()}
    updates = [Update(f"pool/{number}", 10 + number, dict(base)) for number in range(3)]
    for algorithm in AMPLIFICATION:
        updates = [replace(update, scalars={"steps": 2.0, "travel": 0.5}) for update in updates]
        result = secure_round(secure(algorithm, 3, clip=1.0), base, updates)
        expected = plain_round(rule(algorithm, 3), base, updates)
        for name in base:
            assert torch.equal(result[name].view(torch.uint8), expected[name].view(torch.uint8)), algorithm


def test_a_restarted_aggregator_makes_the_same_layout() -> None:
    first = secure("SCAFFOLD", CLIENTS)
    base = model()
    base = secure_round(first, base, trained(base, CLIENTS, seed=1), ["frozen"])
    stored = {name: tensor.clone() for name, tensor in first.state().items()}
    second = secure("SCAFFOLD", CLIENTS)
    second.load_state(stored)
    seed = public_seed("job", 2)
    assert second.arrange(base, BUFFERS, ["frozen"], seed) == first.arrange(base, BUFFERS, ["frozen"], seed)
    assert second.history == first.history
    assert second.layout != secure("SCAFFOLD", CLIENTS).arrange(base, BUFFERS, ["frozen"], seed)


def test_a_new_instance_starts_from_zero_and_a_restored_sum_goes_on() -> None:
    base = {"w": torch.zeros(100)}
    updates = [Update(f"pool/{number}", 10, {"w": torch.full((100,), 0.1 * number)}) for number in range(3)]
    memory: State = {}

    def mapped(specs: object) -> State:
        for spec in wire_specs(hidden.layout):
            memory.setdefault(spec.name, allocate(spec))
        return memory

    hidden = SecureSum(rule("FedAvg", 3), Parameters(max_clients=3), mapped)
    layout = hidden.arrange(base)
    parts = [quantise(layout, base, update.tensors, Contribution(10)).tensors for update in updates]
    hidden.begin(base)
    hidden.accept(Update("", 0, parts[2]))
    hidden.begin(base)  # the first instance has failed
    hidden.accept(Update("", 0, parts[0]))
    hidden.accept(Update("", 0, parts[1]))

    hidden = SecureSum(rule("FedAvg", 3), Parameters(max_clients=3), mapped)  # the aggregator has restarted
    hidden.arrange(base)
    hidden.resume(base, contributors=2)
    hidden.accept(Update("", 0, parts[2]))
    assert hidden.open().weight == 30
    torch.testing.assert_close(hidden.finish()["w"], torch.full((100,), 0.1), atol=1e-4, rtol=0)


def test_a_vector_of_garbage_is_noticed() -> None:
    base = {"w": torch.zeros(100)}
    hidden = secure("FedAvg", 3)
    layout = hidden.arrange(base)
    hidden.begin(base)
    for _ in range(3):
        hidden.accept(Update("", 0, quantise(layout, base, base, Contribution(10)).tensors))
    add_masks(hidden.accumulator, [(bytes(32), 1)])
    with pytest.raises(ImplausibleSumError, match=r"the sum of 3 clients' .* beyond its bounds"):
        hidden.open()


def test_numbers_in_clear_are_a_fault() -> None:
    assert secure("FedNova", 3).problem_with({"steps": 3.0}) is not None
    assert secure("FedNova", 3).problem_with({}) is None


def test_a_model_that_uses_reserved_names_is_refused() -> None:
    for name in ("slope/w", "isthmus.scalars"):
        with pytest.raises(StrategyError, match="rename"):
            secure("FedAvg", 3).arrange({name: torch.zeros(1)})


@pytest.mark.parametrize("algorithm", ["FedAvg", "SCAFFOLD"])
def test_memory_of_a_round_stays_within_a_sum_and_the_rule(algorithm: str) -> None:
    """Counted by torch's allocations: the sum, and then the rule's means, which replace it tensor by tensor."""
    size, count = 1 << 20, 8
    base = {f"w{number}": torch.zeros(size) for number in range(count)}
    hidden = secure(algorithm, 3)
    layout = hidden.arrange(base)
    hidden.begin(base)
    part = quantise(layout, base, base, Contribution(10, {"travel": 1.0})).tensors
    for _ in range(3):
        hidden.accept(Update("", 0, part))
    hidden.open()
    hidden.finish()
    assert not any(name in hidden.accumulator for name in base)  # freed once they had been read
    hidden.arrange(base)
    hidden.begin(base)
    means = vars(hidden._rule)["_means"]
    assert not means  # the last result's memory is free before the next sum grows


def silent(count: int) -> np.ndarray:
    return np.zeros(count)


def private(clip_norm: float, clients: int, noise: float = 0.0) -> Private:
    return Private(rule("FedAvg", clients), clip_norm, noise, clients, silent)


def test_with_differential_privacy_the_sum_is_that_of_the_clipped_changes() -> None:
    base = {name: tensor for name, tensor in model().items() if "running" not in name}
    updates = [replace(update, buffers=update.buffers | {"frozen"}) for update in trained(base, CLIENTS, seed=3)]
    clip_norm = 0.8
    expected = plain_round(private(clip_norm, CLIENTS), base, updates)
    parameters = Parameters(max_clients=CLIENTS, clip_norm=clip_norm)
    hidden = SecureSum(private(clip_norm, CLIENTS), parameters)
    result = secure_round(hidden, base, updates, ["frozen"])
    step = clip_norm / levels(hidden.layout)
    for name, tensor in expected.items():
        if not tensor.is_floating_point() or name == "frozen":
            assert torch.equal(result[name], base[name])
        elif tensor.numel():
            assert not torch.equal(tensor, base[name])
            error = float((result[name].double() - tensor.double()).abs().max())
            assert error <= step + 4 * torch.finfo(tensor.dtype).eps * float(tensor.abs().max())
    assert hidden.sums.scalars["long"] == sum(norm(base, update) > clip_norm for update in updates)
    assert 0 < hidden.sums.scalars["long"] < CLIENTS
    assert hidden.sums.clipped_share == 0  # that of coordinates


def norm(base: State, update: Update) -> float:
    names = [name for name, tensor in base.items() if tensor.is_floating_point() and name not in update.buffers]
    return math.sqrt(sum(float((update.tensors[n].double() - base[n].double()).square().sum()) for n in names))


def test_noise_is_added_once_to_the_opened_sum() -> None:
    base = {"w": torch.zeros(200_000)}
    clip_norm, multiplier, clients = 2.0, 1.5, 4
    hidden = SecureSum(
        Private(rule("FedAvg", clients), clip_norm, multiplier, clients),
        Parameters(max_clients=clients, clip_norm=clip_norm),
    )
    result = secure_round(hidden, base, [Update(f"pool/{n}", 7, dict(base)) for n in range(3)])
    deviation = multiplier * clip_norm / clients
    assert float(result["w"].std()) == pytest.approx(deviation, rel=0.02)
    assert abs(float(result["w"].mean())) < 5 * deviation / math.sqrt(200_000)


def test_the_bound_of_a_round_replaces_the_manifests() -> None:
    base = {"w": torch.zeros(10)}
    hidden = SecureSum(private(1.0, 3), Parameters(max_clients=3, clip_norm=1.0))
    layout = hidden.arrange(base, noise=pb.SecureNoise(clip_norm=0.25))
    assert [tensor.clip for tensor in layout.tensors] == [0.25]
    hidden.begin(base)
    for _ in range(3):
        part = quantise(layout, base, {"w": torch.ones(10)}, Contribution(5)).tensors
        hidden.accept(Update("", 0, part))
    assert hidden.open().scalars["long"] == 3
    result = hidden.finish()["w"]
    assert float(result.norm()) == pytest.approx(0.25, rel=1e-6)


def test_statistics_do_not_go_with_differential_privacy() -> None:
    hidden = SecureSum(private(1.0, 3), Parameters(max_clients=3, clip_norm=1.0))
    with pytest.raises(StrategyError, match="GroupNorm"):
        hidden.arrange(model(), BUFFERS)
