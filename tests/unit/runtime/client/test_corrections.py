"""Numbers that clients measure, and state that they keep, for strategies."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import isthmus
from isthmus.client.context import Context
from isthmus.client.corrections.base import Correction, CountedSteps, InitialLoss
from isthmus.client.corrections.feddyn import DynamicRegularizer
from isthmus.client.corrections.proximal import ProximalTerm
from isthmus.client.corrections.scaffold import ControlVariates
from isthmus.client.corrections.step_meter import StepMeter
from isthmus.client.round import Round
from isthmus.client.state.parameter_names import ParameterNames
from isthmus.client.state.persistent_tensors import PersistentTensors

SHARED = torch.ones(3)
RATE = 0.1


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.3}],
    ids=["plain", "momentum", "nesterov", "dampening"],
)
def test_travel_is_how_far_a_unit_gradient_goes(options: dict[str, float]) -> None:
    weight = parameter()
    meter = StepMeter(ParameterNames({"w": weight}))
    optimizer = torch.optim.SGD([weight], lr=RATE, **options)  # type: ignore[arg-type]
    for _ in range(6):
        weight.grad = torch.ones(2)
        optimizer.step()
    meter.close()
    assert meter.travel == pytest.approx(-weight[0].item())
    assert meter.steps == pytest.approx(meter.travel / RATE)
    optimizer.step()
    assert meter.travel < -weight[0].item()  # the meter is closed


def test_other_optimizers_steps_count_once_and_other_models_not_at_all() -> None:
    weight, foreign = parameter(), parameter()
    counted = CountedSteps(ParameterNames({"w": weight}))
    with pytest.raises(ValueError, match="FedNova counts the steps of torch optimizers"):
        counted.scalars({})
    for optimizer in (torch.optim.Adam([weight]), torch.optim.SGD([foreign], lr=RATE)):
        for _ in range(4):
            weight.grad = foreign.grad = torch.ones(2)
            optimizer.step()
    counted.close()
    assert counted.scalars({}) == {"steps": 4.0}


def test_the_steps_of_optimizers_that_follow_each_other_add_up() -> None:
    """A new optimizer for every epoch, kept or not; each one's momentum starts at zero."""
    weight, kept = parameter(), []
    meter = StepMeter(ParameterNames({"w": weight}))
    for epoch in range(4):
        optimizer = torch.optim.SGD([weight], lr=RATE, momentum=0.9)
        kept += [optimizer] if epoch % 2 else []
        for _ in range(10):
            weight.grad = torch.ones(2)
            optimizer.step()
    meter.close()
    assert meter.travel == pytest.approx(-weight[0].item(), rel=1e-4)
    assert meter.steps == pytest.approx(meter.travel / RATE)
    counted = CountedSteps(ParameterNames({"w": weight}))
    for _ in range(4):
        optimizer = torch.optim.SGD([weight], lr=RATE)
        for _ in range(10):
            optimizer.step()
    counted.close()
    assert counted.scalars({}) == {"steps": 40.0}


def test_of_optimizers_of_different_parameters_the_one_that_went_farthest_counts() -> None:
    """Optimizers of a generator and a discriminator: a parameter that both hold counts the steps of both."""
    weights = {name: parameter() for name in ("generator", "discriminator", "shared")}
    counted = CountedSteps(ParameterNames(weights))
    generator = torch.optim.SGD([weights["generator"]], lr=RATE)
    discriminator = torch.optim.Adam([weights["discriminator"]])
    for _ in range(3):
        generator.step()
        for _ in range(5):
            discriminator.step()
    assert counted.scalars({}) == {"steps": 15.0}
    generator.add_param_group({"params": [weights["shared"]]})
    discriminator.add_param_group({"params": [weights["shared"]]})
    for _ in range(10):
        generator.step()
        discriminator.step()
    assert counted.scalars({}) == {"steps": 25.0}
    for _ in range(10):
        generator.step()
    assert counted.scalars({}) == {"steps": 30.0}
    counted.close()


class Around(torch.optim.Optimizer):
    """Optimizer that delegates its steps to an inner one, as ZeroRedundancyOptimizer does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.inner.step()


def test_a_step_that_an_optimizer_inside_takes_is_one_step() -> None:
    weight = parameter()
    meter = StepMeter(ParameterNames({"w": weight}))
    optimizer = Around(torch.optim.SGD([weight], lr=RATE, momentum=0.9))
    for _ in range(5):
        weight.grad = torch.ones(2)
        optimizer.step()
    meter.close()
    assert meter.travel == pytest.approx(-weight[0].item())


def test_a_meter_keeps_no_optimizer() -> None:
    weight = parameter()
    rnd = Round(1, {}, CountedSteps(ParameterNames({"w": weight})))
    optimizer = rnd.wrap(torch.optim.SGD([weight], lr=RATE))
    optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


def test_where_the_initial_loss_comes_from() -> None:
    assert InitialLoss({"loss": 2.0}).scalars({"initial_loss": 3.0}) == {"loss": 3.0}
    assert InitialLoss({"loss": 2.0}).scalars({"loss": 1.0}) == {"loss": 2.0}  # this is the loss after training
    assert InitialLoss({"eval_loss": 4.0}).scalars({}) == {"loss": 4.0}
    with pytest.raises(ValueError, match=r"pass initial_loss to rnd\.submit"):
        InitialLoss({}).scalars({"loss": 1.0})


@pytest.mark.parametrize(
    "correction", [ControlVariates(ParameterNames({}), {}, {}), DynamicRegularizer(ParameterNames({}), {}, 0.1)]
)
def test_a_script_that_does_not_wrap_gets_an_error(correction: Correction) -> None:
    with pytest.raises(RuntimeError, match=r"needs rnd.wrap\(optimizer\)"):
        correction.updated_state()
    correction.close()


def test_memory_survives_a_restart_where_there_is_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Context(pool="pool", index=3)
    PersistentTensors("SCAFFOLD", "uid", place).advance({"w": torch.ones(2)}, 1)
    assert PersistentTensors("SCAFFOLD", "uid", place).tensors == {}
    monkeypatch.setenv("ISTHMUS_SCRATCH", str(tmp_path / "scratch"))
    PersistentTensors("SCAFFOLD", "uid", place).advance({"w": torch.ones(2)}, 1)
    assert PersistentTensors("SCAFFOLD", "uid", place).tensors["w"].tolist() == [1.0, 1.0]
    assert PersistentTensors("SCAFFOLD", "another job", place).tensors == {}
    assert PersistentTensors("FedDyn", "uid", place).tensors == {}
    next((tmp_path / "scratch").iterdir()).write_bytes(b"garbage")
    assert PersistentTensors("SCAFFOLD", "uid", place).tensors == {}


def test_weights_that_are_not_contiguous_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory formats that safetensors rejects: channels_last, and a transposed parameter."""
    monkeypatch.setenv("ISTHMUS_SCRATCH", str(tmp_path / "scratch"))
    place = Context(pool="pool")
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    model.turned = torch.nn.Parameter(torch.randn(2, 3).t())
    memory = PersistentTensors("FedDyn", "uid", place)
    correction = DynamicRegularizer(ParameterNames.of(model, model.state_dict()), memory.tensors, 0.1)
    optimizer = Round(1, {}, correction).wrap(torch.optim.SGD(model.parameters(), lr=RATE))
    (model(torch.ones(1, 3, 3, 3)).sum() + model.turned.sum()).backward()
    optimizer.step()
    outcome = correction.updated_state()
    assert outcome is not None and not outcome["weight"].is_contiguous() and not outcome["turned"].is_contiguous()
    memory.advance(outcome, 1)
    (path,) = (tmp_path / "scratch").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    again = PersistentTensors("FedDyn", "uid", place)
    assert set(again.tensors) == {"weight", "bias", "turned"}
    for name, tensor in again.tensors.items():
        torch.testing.assert_close(tensor, outcome[name], rtol=0, atol=0)


@pytest.mark.parametrize("tensors", [{"w": torch.eye(3).to_sparse()}, {"a": SHARED, "b": SHARED[:2]}])
def test_what_cannot_be_kept_does_not_end_the_client(
    tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ISTHMUS_SCRATCH", str(tmp_path))
    memory = PersistentTensors("SCAFFOLD", "uid", Context(pool="pool"))
    memory.advance(tensors, 1)
    assert memory.tensors is tensors
    assert "cannot store SCAFFOLD in" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_memory_of_another_shape_is_reset(caplog: pytest.LogCaptureFixture) -> None:
    weight = parameter()
    correction = DynamicRegularizer(ParameterNames({"w": weight}), {"w": torch.ones(5)}, 0.5)
    optimizer = Round(1, {}, correction).wrap(torch.optim.SGD([weight], lr=RATE))
    weight.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(correction.updated_state() or {}, {"w": torch.full((2,), RATE * 0.5)})
    correction.close()
    assert "FedDyn: the stored state of w has another shape" in caplog.text


def handing_in(correction: Correction, sent: list[int]) -> Round:
    def finish(count: int, metrics: dict[str, float]) -> Callable[[], object]:
        correction.scalars(metrics)
        return lambda: sent.append(count)

    return Round(1, {}, correction, finish)


def test_submit_may_be_called_again_with_what_was_missing() -> None:
    sent: list[int] = []
    attempts: list[tuple[Correction, dict[str, Any], dict[str, float]]] = [
        (InitialLoss({}), {"loss": 1.0}, {"loss": 1.0, "initial_loss": 2.0}),
        (Correction(), {"loss": "low"}, {"loss": 1.0}),
    ]
    for correction, wrong, right in attempts:
        rnd = handing_in(correction, sent)
        with pytest.raises(ValueError, match="loss"):
            rnd.submit(num_examples=1, **wrong)
        assert not rnd.submitted
        rnd.submit(num_examples=1, **right)
        with pytest.raises(RuntimeError, match="called twice"):
            rnd.submit(num_examples=1, **right)
    assert sent == [1, 1]


def test_submit_may_be_called_again_after_wrap() -> None:
    weight = parameter()
    correction = ProximalTerm(0.5, ParameterNames({"w": weight}))
    rnd = handing_in(correction, sent := [])
    with pytest.raises(isthmus.ScriptError, match=r"needs rnd\.wrap"):
        rnd.submit(num_examples=1)
    rnd.wrap(torch.optim.SGD([weight], lr=RATE))
    rnd.submit(num_examples=3)
    assert sent == [3]
    correction.close()
