"""User-defined strategies, including those that cannot be loaded or return invalid results."""

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from isthmus.aggregator.storage.checkpoints import CheckpointStore
from isthmus.strategies import Setup, Strategy, StrategyError, Update, make_strategy
from isthmus.strategies.averaging.fedavg import FedAvg
from isthmus.tensors import State
from isthmus_contracts.api.strategy import Strategy as Spec
from isthmus_contracts.manifests.manifest import ManifestError

from .rounds import model, run, updates

DOCS = Path(__file__).parents[4] / "docs" / "training" / "strategies.md"


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
        if self.how == 6:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere")
        if self.how == 7:
            return None  # type: ignore[return-value]
        if self.how == 8:
            result["w"] = 3  # type: ignore[assignment]
        if self.how == 9:
            result["w"] = result["w"].to_sparse()
        if self.how == 10:
            result["w"].fill_(-1e30)
        return result


class Asking(FedAvg):
    scalars = ("steps",)


class Answer(FedAvg):
    """Strategy whose methods other than ``finish`` are defined by the test."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.answers: dict[str, object] = {}

    def begin(self, model: State) -> None:
        self._answer("begin")
        super().begin(model)

    def accept(self, update: Update) -> None:
        self._answer("accept")
        super().accept(update)

    def finish(self) -> State:
        return {name: torch.nn.Parameter(value, value.is_floating_point()) for name, value in super().finish().items()}

    def companion(self) -> State:
        return self._answer("companion")

    def state(self) -> State:
        return self._answer("state")

    def load_state(self, state: State) -> None:
        self._answer("load_state")

    def _answer(self, method: str) -> Any:
        answer = self.answers.get(method, {})
        if isinstance(answer, Exception):
            raise answer
        return answer


class Unfinished(Strategy):
    pass


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("rules")
    made.__dict__.update(Broken=Broken, Asking=Asking, Answer=Answer, Unfinished=Unfinished, number=3)
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
        (
            "rules:Asking",
            {},
            "its scalars are ('steps',), which clients report for the built-in algorithms only",
        ),
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
        ("6", "finish() raised FileNotFoundError: [Errno 2] No such file or directory: '/nowhere'"),
        ("7", "finish() returned no model: it is a NoneType, not a dict of tensors"),
        ("8", "finish() returned no model: w is a int, not a tensor"),
        ("9", "finish() returned no model: w is a tensor of layout torch.sparse_coo, not a dense one"),
    ],
)
def test_errors_and_invalid_results_name_the_class(module: ModuleType, how: str, message: str) -> None:
    base = model()
    with pytest.raises(StrategyError) as error:
        run(custom("rules:Broken", how=how), base, updates(base, 2, seed=1))
    assert str(error.value) == f"spec.strategy.class: rules:Broken: {message}"


def calls(answers: dict[str, object]) -> dict[str, Callable[[], object]]:
    """Return a strategy in the middle of a round, with the given methods replaced."""
    strategy, base = custom("rules:Answer"), model()
    strategy.begin(base)
    strategy._strategy.answers.update(answers)  # type: ignore[attr-defined]
    return {
        "begin": lambda: strategy.begin(base),
        "accept": lambda: strategy.accept(updates(base, 1, seed=1)[0]),
        "companion": strategy.companion,
        "state": strategy.state,
        "load_state": lambda: strategy.load_state({}),
    }


METHODS = ["begin", "accept", "companion", "state", "load_state"]


@pytest.mark.parametrize("method", METHODS)
def test_a_full_disk_alone_passes(module: ModuleType, method: str) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "gone", "x"), OSError("without a number"), ValueError("no\nway")):
        with pytest.raises(StrategyError) as raised:
            calls({method: error})[method]()
        said = " ".join(f"{type(error).__name__}: {error}".split())
        assert str(raised.value) == f"spec.strategy.class: rules:Answer: {method}() raised {said}"
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with pytest.raises(OSError, match="no room"):
            calls({method: OSError(number, "no room")})[method]()


@pytest.mark.parametrize("method", ["state", "companion"])
def test_what_cannot_be_written_is_named(module: ModuleType, method: str) -> None:
    wrong: dict[str, object] = {
        "step is a int, not a tensor": {"step": 3},
        "c has dtype torch.complex64, which cannot be sent": {"c": torch.zeros(2, dtype=torch.complex64)},
        "it is a NoneType, not a dict of tensors": None,
        "the name 3 is a int, not a string": {3: torch.zeros(1)},
        "m is on the meta device, where tensors have no values: load the model's weights first": {
            "m": torch.zeros(1, device="meta")
        },
    }
    for problem, returned in wrong.items():
        with pytest.raises(StrategyError) as raised:
            calls({method: returned})[method]()
        assert str(raised.value) == f"spec.strategy.class: rules:Answer: {method}() returned no {method}: {problem}"


def test_tensors_need_not_be_plain(module: ModuleType, tmp_path: Path) -> None:
    """Parameters with a gradient, and views, can be stored."""
    base, strategy = model(), custom("rules:Answer")
    result = run(strategy, base, updates(base, 2, seed=1))
    grown = torch.nn.Parameter(torch.arange(6.0).view(2, 3)).T
    strategy._strategy.answers["state"] = {"grown": grown}  # type: ignore[attr-defined]
    store = CheckpointStore(tmp_path, "uid", keep=1)
    store.open()
    store.save(1, result, strategy.state())
    kept = store.latest()
    assert kept is not None
    assert torch.equal(kept.state["w"], result["w"])
    assert torch.equal(kept.strategy["grown"], grown.detach())


def test_a_result_is_brought_within_what_updates_may_hold(module: ModuleType) -> None:
    base = model()
    result = run(custom("rules:Broken", how="10"), base, updates(base, 2, seed=1))
    assert set(result["w"].flatten().tolist()) == {-(2.0**60)}
    assert result["b"].abs().max() < 10
