"""Corrections apply once to each step of optimizers that wrap others, or wrap() raises an error."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

import isthmus
from isthmus.client.corrections.base import Correction, GradientCorrection
from isthmus.client.corrections.feddyn import DynamicRegularizer
from isthmus.client.corrections.proximal import ProximalTerm
from isthmus.client.corrections.scaffold import ControlVariates
from isthmus.client.round import Round
from isthmus.client.state.parameter_names import ParameterNames

RATE, MU = 0.1, 0.5
Make = Callable[[torch.nn.Module], GradientCorrection]


def control(model: torch.nn.Module, scale: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(weight, scale) for name, weight in model.named_parameters()}


def proximal(model: torch.nn.Module) -> GradientCorrection:
    return ProximalTerm(MU, ParameterNames.of(model, model.state_dict()))


def scaffold(model: torch.nn.Module) -> GradientCorrection:
    return ControlVariates(ParameterNames.of(model, model.state_dict()), control(model, 0.25), control(model, 0.5))


def feddyn(model: torch.nn.Module) -> GradientCorrection:
    return DynamicRegularizer(ParameterNames.of(model, model.state_dict()), control(model, 0.75), MU)


every_correction = pytest.mark.parametrize("make", [proximal, scaffold, feddyn])


class Look(torch.optim.Optimizer):
    """Lookahead as in timm and its many copies, whose hooks are never called."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.base, self.param_groups, self.defaults, self.state = base, base.param_groups, base.defaults, base.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


class Bare:
    """Wrapper that is not a torch optimizer, and holds its inner ones in a list."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.optimizers = [base]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizers[0].param_groups

    def zero_grad(self) -> None:
        self.optimizers[0].zero_grad()

    def step(self) -> None:
        self.optimizers[0].step()


class Proper(torch.optim.Optimizer):
    """Wrapper whose hooks are called, and whose inner optimizer is replaced from time to time."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base = base

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base = torch.optim.SGD(self.base.param_groups)
        super().zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step(closure)


class Hybrid(torch.optim.Optimizer):
    """Optimizer that updates matrices itself and delegates other parameters to an inner one, as Muon does."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, {})
        held = [parameter for group in base.param_groups for parameter in group["params"]]
        self.matrices = [parameter for parameter in held if parameter.ndim > 1]
        self.rest = torch.optim.SGD([parameter for parameter in held if parameter.ndim == 1], lr=RATE)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for parameter in self.matrices:
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=RATE)
        self.rest.step()


class Calls(torch.optim.SGD):
    """Subclass whose step calls that of its base class; torch calls the hooks in both."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, lr=RATE)

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def accelerated(base: torch.optim.Optimizer) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare_optimizer(base)


def trained(make: Make | None, around: Callable[[Any], Any], closures: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 3)
    correction = make(model) if make is not None else Correction()
    optimizer = Round(1, {}, correction).wrap(around(torch.optim.SGD(model.parameters(), lr=RATE)))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(torch.ones(4, 2)) - 1).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        if closures:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    correction.scalars({})
    correction.updated_state()
    correction.close()
    return model


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.allclose(a, b, atol=1e-7) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@every_correction
@pytest.mark.parametrize("around", [Look, Bare, Proper, Hybrid, Calls, accelerated, lambda base: Look(Proper(base))])
def test_the_steps_of_what_is_inside_are_corrected_once(make: Make, around: Callable[[Any], Any]) -> None:
    expected = trained(make, lambda base: base)
    assert not same(expected, trained(None, lambda base: base))
    assert same(expected, trained(make, around))


@every_correction
@pytest.mark.parametrize("around", [Look, Calls])
def test_closures_reach_what_is_inside(make: Make, around: Callable[[Any], Any]) -> None:
    assert same(trained(make, lambda base: base), trained(make, around, closures=True))


@every_correction
def test_opacus(make: Make) -> None:
    """Opacus' optimizer computes the gradients in its step; without noise and clipping they equal the plain ones."""
    opacus = pytest.importorskip("opacus")
    results = []
    for private in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 3)
        correction = make(model)
        module: Any = model
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=RATE)
        if private:
            module = opacus.GradSampleModule(model)
            optimizer = opacus.optimizers.DPOptimizer(
                optimizer, noise_multiplier=0.0, max_grad_norm=1e6, expected_batch_size=4
            )
        Round(1, {}, correction).wrap(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            module(torch.ones(4, 2)).square().mean(dim=1).mean().backward()
            optimizer.step()
        correction.scalars({})
        correction.close()
        results.append(model)
    for a, b in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Own(Look):
    """Optimizer with a step of its own that calls no hooks."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base)
        del self.base


@every_correction
def test_steps_that_cannot_be_reached_are_refused(make: Make) -> None:
    model = torch.nn.Linear(2, 3)
    optimizer = Own(torch.optim.SGD(model.parameters(), lr=RATE))
    with pytest.raises(ValueError, match="Own takes its steps by itself, without the hooks of"):
        Round(1, {}, make(model)).wrap(optimizer)
    Round(1, {}, Correction()).wrap(optimizer)  # nothing to correct


@every_correction
def test_a_step_without_the_correction_is_an_error_at_submit(make: Make) -> None:
    for wraps, message in ((0, r"needs rnd\.wrap\(optimizer\)"), (1, "a step of SGD was not corrected")):
        model = torch.nn.Linear(2, 3)
        correction = make(model)
        rnd = Round(1, {}, correction)
        for number in range(2):
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
            if number < wraps:
                rnd.wrap(optimizer)
            model(torch.ones(4, 2)).square().mean().backward()
            optimizer.step()
        with pytest.raises(isthmus.ScriptError, match=message):
            correction.scalars({})
        correction.close()


def test_an_object_that_is_not_an_optimizer_is_an_error() -> None:
    with pytest.raises(isthmus.ScriptError, match=r"rnd\.wrap\(\) takes an optimizer, not Linear"):
        Round(1, {}).wrap(torch.nn.Linear(1, 1))  # type: ignore[type-var]
