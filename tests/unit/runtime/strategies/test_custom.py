"""A user's own class: what it may do, and what happens when it cannot be loaded or misbehaves."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from isthmus.strategies import Setup, Strategy, StrategyError, Update, make_strategy
from isthmus.strategies.fedavg import FedAvg
from isthmus.tensors import State
from isthmus_contracts.manifest import ManifestError
from isthmus_contracts.strategy import Strategy as Spec

from .rounds import model, run, updates

DOCS = Path(__file__).parents[4] / "docs" / "strategies.md"


class Broken(FedAvg):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.how = setup.parameters.get("how", 0)
        if self.how == 1:
            raise ValueError("no\nsuch thing")

    def accept(self, update: Update) -> None:
        if self.how == 2:
            raise KeyError("momentum")
        super().accept(update)

    def finish(self) -> State:
        result = super().finish()
        if self.how == 3:
            del result["w"]
        if self.how == 4:
            result["w"].fill_(float("nan"))
        if self.how == 5:
            result["w"] = result["w"].double()
        return result


class Unfinished(Strategy):
    pass


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("rules")
    made.__dict__.update(Broken=Broken, Unfinished=Unfinished, number=3)
    monkeypatch.setitem(sys.modules, "rules", made)
    return made


def custom(reference: str, **parameters: str) -> Strategy:
    return make_strategy(Spec.model_validate({"algorithm": "Custom", "class": reference, "parameters": parameters}))


def test_the_documented_class_works(module: ModuleType) -> None:
    code = DOCS.read_text().split("```python\n")[1].split("```")[0]
    exec(code, module.__dict__)  # noqa: S102 - our own documentation
    base = model()
    contributions = updates(base, 3, seed=1)
    result = run(custom("rules:Halfway", share="0.5"), base, contributions)
    mean = torch.stack([update.tensors["w"] for update in contributions]).mean(dim=0)
    torch.testing.assert_close(result["w"], (base["w"] + mean) / 2)
    assert (result["b"].dtype, result["seen"].dtype) == (torch.float64, torch.int64)


@pytest.mark.parametrize(
    ("reference", "parameters", "message"),
    [
        ("no_such.rules:A", {}, "no_such.rules cannot be imported: ModuleNotFoundError: No module named 'no_such'"),
        ("rules:Missing", {}, "rules has no Missing"),
        ("rules:number", {}, "is no subclass of isthmus.strategies.Strategy"),
        ("rules:Unfinished", {}, "cannot be made: TypeError: "),
        ("rules:Broken", {"how": "1"}, "cannot be made: ValueError: no such thing"),
    ],
)
def test_what_cannot_be_loaded(module: ModuleType, reference: str, parameters: dict[str, str], message: str) -> None:
    with pytest.raises(ManifestError) as error:
        custom(reference, **parameters)
    assert str(error.value).startswith(f"spec.strategy.class: {reference}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("2", "accept() raised KeyError: 'momentum'"),
        ("3", "finish() returned no model: tensors are missing: w"),
        ("4", "finish() returned no model: w holds NaN or infinity"),
        ("5", "finish() returned no model: w is F64, but the model's is F32"),
    ],
)
def test_what_misbehaves(module: ModuleType, how: str, message: str) -> None:
    base = model()
    with pytest.raises(StrategyError) as error:
        run(custom("rules:Broken", how=how), base, updates(base, 2, seed=1))
    assert str(error.value) == f"spec.strategy.class: rules:Broken: {message}"
