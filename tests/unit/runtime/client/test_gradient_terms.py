"""Terms of corrections with closures, sparse gradients, and parameters that share memory."""

from collections.abc import Callable

import pytest
import torch

from isthmus.client.corrections.base import Correction
from isthmus.client.corrections.feddyn import DynamicRegularizer
from isthmus.client.corrections.proximal import ProximalTerm
from isthmus.client.corrections.scaffold import ControlVariates
from isthmus.client.round import Round
from isthmus.client.state.parameter_names import ParameterNames

RATE, MU = 0.1, 0.5
Make = Callable[[torch.nn.Module], Correction]


def names(model: torch.nn.Module) -> ParameterNames:
    return ParameterNames.of(model, model.state_dict())


def control(model: torch.nn.Module, scale: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(weight, scale) for name, weight in model.named_parameters()}


def proximal(model: torch.nn.Module) -> Correction:
    return ProximalTerm(MU, names(model))


def scaffold(model: torch.nn.Module) -> Correction:
    return ControlVariates(names(model), control(model, 0.25), control(model, 0.5))


def feddyn(model: torch.nn.Module) -> Correction:
    return DynamicRegularizer(names(model), control(model, 0.75), MU)


every_correction = pytest.mark.parametrize("make", [proximal, scaffold, feddyn])


def trained(
    make: Make, call: str, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **options: object
) -> torch.Tensor:
    """Return a regression's weights after some steps, with gradients computed before each step or in a closure."""
    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    correction = make(model)
    wrapped = Round(1, {}, correction).wrap(optimizer(model.parameters(), lr=RATE, **options))  # type: ignore[call-arg]

    def closure() -> torch.Tensor:
        wrapped.zero_grad()
        loss = (model(torch.ones(4, 2)) - 1).square().mean()
        loss.backward()
        return loss

    for _ in range(10):
        if call == "before":
            closure()
            wrapped.step()
        else:
            result = wrapped.step(closure) if call == "positional" else wrapped.step(closure=closure)
            assert isinstance(result, torch.Tensor)  # the script's own loss, without the added terms
    correction.close()
    return model.weight.detach()


@every_correction
@pytest.mark.parametrize("call", ["positional", "keyword"])
def test_gradients_that_a_closure_makes_are_corrected(make: Make, call: str) -> None:
    expected = trained(make, "before")
    assert not torch.allclose(expected, trained(lambda model: Correction(), "before"), atol=1e-2)
    torch.testing.assert_close(trained(make, call), expected)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_every_evaluation_of_a_closure_is_corrected_once(search: str | None) -> None:
    """The regularised loss (2 w - 1)^2 + MU w^2 of equal weights w has its minimum at 2 / (4 + MU)."""
    weights = trained(proximal, "positional", torch.optim.LBFGS, line_search_fn=search)
    torch.testing.assert_close(weights, torch.full((1, 2), 2 / (4 + MU)), rtol=1e-2, atol=1e-3)


@every_correction
def test_sparse_gradients_are_corrected_as_dense_ones_are(make: Make) -> None:
    results = []
    for sparse in (False, True):
        table = torch.nn.Embedding(5, 3, sparse=sparse)
        with torch.no_grad():
            table.weight.fill_(1.0)
        correction = make(table)
        optimizer = Round(1, {}, correction).wrap(torch.optim.SGD(table.parameters(), lr=RATE))
        for row in (1, 1, 3):
            optimizer.zero_grad()
            table(torch.tensor([row, row])).square().sum().backward()
            optimizer.step()
        correction.close()
        results.append(table.weight.detach())
    torch.testing.assert_close(results[1], results[0])


@every_correction
def test_an_optimizer_for_sparse_gradients_alone_is_refused(make: Make) -> None:
    table = torch.nn.Embedding(5, 3, sparse=True)
    correction = make(table)
    with pytest.raises(ValueError, match="SparseAdam takes only sparse gradients"):
        Round(1, {}, correction).wrap(torch.optim.SparseAdam(table.parameters()))
    stays_here = torch.nn.Embedding(5, 3, sparse=True)
    Round(1, {}, correction).wrap(torch.optim.SparseAdam(stays_here.parameters()))
    correction.close()


class Tied(torch.nn.Module):
    """Autoencoder whose decoder is a separate Parameter over the encoder's transposed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 3, bias=False)
        self.dec.weight = torch.nn.Parameter(self.enc.weight.t())

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = self.dec(self.enc(values))
        return decoded


@every_correction
def test_parameters_over_the_same_values_are_corrected_once(make: Make) -> None:
    """Two parameters over the same values behave like one that is used twice."""
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    start = torch.randn(2, 3, generator=torch.Generator().manual_seed(2))
    tied, single = Tied(), torch.nn.Linear(3, 2, bias=False)
    outcomes = []
    for model in (tied, single):
        with torch.no_grad():
            next(model.parameters()).copy_(start)
        correction = make(model)
        optimizer = Round(1, {}, correction).wrap(torch.optim.SGD(model.parameters(), lr=RATE))
        for _ in range(5):
            optimizer.zero_grad()
            code = model(inputs)
            output = code if model is tied else code @ single.weight
            (output - inputs).square().mean().backward()
            optimizer.step()
        outcomes.append(correction.updated_state() or {})
        correction.close()
    torch.testing.assert_close(tied.enc.weight, single.weight)
    if outcomes[1]:
        torch.testing.assert_close(outcomes[0]["enc.weight"], outcomes[1]["weight"])
        torch.testing.assert_close(outcomes[0]["dec.weight"], outcomes[1]["weight"].t())
