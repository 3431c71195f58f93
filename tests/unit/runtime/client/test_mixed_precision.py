"""Corrections with autocast, GradScaler and gradient accumulation: as in single precision, once per optimizer step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from isthmus.client.corrections.base import Correction, CountedSteps
from isthmus.client.corrections.feddyn import DynamicRegularizer
from isthmus.client.corrections.proximal import ProximalTerm
from isthmus.client.corrections.scaffold import ControlVariates
from isthmus.client.round import Round
from isthmus.client.state.parameter_names import ParameterNames

RATE, MU, SCALE = 0.25, 0.5, 1024.0
CONTROL, OWN = torch.tensor([0.5, -1.0]), torch.tensor([0.25, 0.25])


def proximal(names: ParameterNames) -> Correction:
    return ProximalTerm(MU, names)


def scaffold(names: ParameterNames) -> Correction:
    return ControlVariates(names, {"w": OWN}, {"w": CONTROL})


def feddyn(names: ParameterNames) -> Correction:
    return DynamicRegularizer(names, {"w": OWN}, MU)


def expected_term(make: Callable[[ParameterNames], Correction], change: torch.Tensor) -> torch.Tensor:
    """Return the term that a correction adds to the gradient, according to its paper."""
    if make is proximal:
        return MU * change
    return CONTROL - OWN if make is scaffold else MU * change - OWN


@contextmanager
def training(
    make: Callable[[ParameterNames], Correction], fused: bool
) -> Iterator[tuple[torch.Tensor, torch.optim.SGD, Correction]]:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    correction = make(ParameterNames({"w": weight}))
    optimizer = Round(1, {}, correction).wrap(torch.optim.SGD([weight], lr=RATE, fused=fused))
    yield weight, optimizer, correction
    correction.close()


every_correction = pytest.mark.parametrize("make", [proximal, scaffold, feddyn])
# A fused optimizer gets scaled gradients and unscales them itself.
either_optimizer = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


@every_correction
@either_optimizer
@pytest.mark.parametrize("unscales", [False, True])
def test_the_correction_is_not_scaled(
    make: Callable[[ParameterNames], Correction], fused: bool, unscales: bool
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    with training(make, fused) as (weight, optimizer, _):
        expected = start = weight.detach().clone()
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = (weight * torch.tensor([2.0, 4.0])).sum()
            scaler.scale(loss).backward()
            if unscales:  # as scripts that clip gradients do
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            gradient = torch.tensor([2.0, 4.0]) + expected_term(make, expected - start)
            expected = expected - RATE * gradient
            torch.testing.assert_close(weight.detach(), expected)


@every_correction
@either_optimizer
def test_a_step_that_the_scaler_skips_leaves_no_trace(
    make: Callable[[ParameterNames], Correction], fused: bool
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    with training(make, fused) as (weight, optimizer, correction):
        expected = start = weight.detach().clone()
        for number in range(3):
            optimizer.zero_grad()
            factor = float("inf") if number == 1 else 1.0
            scaler.scale((weight * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            if number != 1:
                expected = expected - RATE * (1.0 + expected_term(make, expected - start))
            torch.testing.assert_close(weight.detach(), expected)
        if make is scaffold:
            assert correction.scalars({}) == {"travel": 2 * RATE}


@either_optimizer
def test_skipped_steps_are_not_counted(fused: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    with training(CountedSteps, fused) as (weight, optimizer, correction):
        for factor in (1.0, float("nan"), 1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale((weight * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert correction.scalars({}) == {"steps": 3.0}


@every_correction
def test_accumulated_gradients_are_corrected_once(make: Callable[[ParameterNames], Correction]) -> None:
    with training(make, fused=False) as (weight, optimizer, correction):
        expected = start = weight.detach().clone()
        for _ in range(3):
            optimizer.zero_grad()
            for part in range(4):
                ((weight * float(part)).sum() / 4).backward()
            optimizer.step()
            expected = expected - RATE * (1.5 + expected_term(make, expected - start))
            torch.testing.assert_close(weight.detach(), expected)
        if make is scaffold:
            assert correction.scalars({}) == {"travel": 3 * RATE}


def test_accumulated_steps_are_counted_once() -> None:
    with training(CountedSteps, fused=False) as (weight, optimizer, correction):
        for micro in range(12):
            (weight.sum() / 4).backward()
            if micro % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
        assert correction.scalars({}) == {"steps": 3.0}


@every_correction
def test_wrapping_twice_corrects_once_and_a_closed_round_corrects_no_more(
    make: Callable[[ParameterNames], Correction],
) -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    correction = make(ParameterNames({"w": weight}))
    optimizer = torch.optim.SGD([weight], lr=RATE)
    rnd = Round(1, {}, correction)
    rnd.wrap(rnd.wrap(optimizer))
    expected = start = weight.detach().clone()
    for closed in (False, False, True):
        if closed:
            correction.close()
        weight.grad = torch.ones(2)
        optimizer.step()
        term = torch.zeros(2) if closed else expected_term(make, expected - start)
        expected = expected - RATE * (1.0 + term)
        torch.testing.assert_close(weight.detach(), expected)


def test_a_model_of_half_precision_keeps_its_dtype() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    correction = scaffold(ParameterNames({"w": weight}))
    optimizer = Round(1, {}, correction).wrap(torch.optim.SGD([weight], lr=RATE))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.detach().float().tolist() == [1 - RATE * 1.25, 2 - RATE * -0.25]
    outcome = correction.updated_state()
    assert outcome is not None
    assert outcome["w"].dtype == torch.float32
    correction.close()
