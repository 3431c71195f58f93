"""What a strategy changes in a client's training, and what it wants to know of it."""

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch

from ...tensors import State
from ..errors import ScriptError
from ..state.parameter_names import Names
from .gradient_terms import GradientTerms
from .optimizers import parameters_of
from .step_meter import StepMeter

log = logging.getLogger("isthmus")


class Correction:
    """One round's. This one, for strategies that leave the clients alone, does nothing."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Hooks into an optimizer, before its first step of the round."""

    def scalars(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return what goes into the update's header after training. Raises ``ValueError`` where it is not known."""
        return {}

    def outcome(self) -> State | None:
        """Return what to remember if the update is accepted, or ``None``. Must be called before :meth:`close`."""
        return None

    def close(self) -> None:
        """Ends it: the round is over."""


class CountedSteps(Correction):
    """FedNova: the number of steps."""

    def __init__(self, names: Names) -> None:
        self._meter = StepMeter(names)

    def scalars(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {"steps": _positive(self._meter.steps, "FedNova")}

    def close(self) -> None:
        self._meter.close()


class InitialLoss(Correction):
    """q-FedAvg: the loss at the global model, as the script's metrics tell it, or else its evaluation function."""

    def __init__(self, evaluation: Mapping[str, float]) -> None:
        self._evaluation = evaluation

    def scalars(self, metrics: Mapping[str, float]) -> dict[str, float]:
        for name, source in (("initial_loss", metrics), ("loss", self._evaluation), ("eval_loss", self._evaluation)):
            if name in source:
                return {"loss": source[name]}
        raise ScriptError(
            "QFedAvg needs the loss at the global model: pass initial_loss to rnd.submit(),"
            " or let the evaluation function return it as loss"
        )


class GradientCorrection(Correction):
    """A correction that adds terms to gradients before every optimizer step."""

    name = ""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._terms = GradientTerms(self._terms_of)
        self._meter = StepMeter(names, self._terms.corrects)
        self._attached = False

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        self._attached = True

    def scalars(self, metrics: Mapping[str, float]) -> dict[str, float]:
        self._require_applied()
        return {}

    def close(self) -> None:
        self._meter.close()
        self._terms.close()

    @abstractmethod
    def _terms_of(self, parameter: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield what is to be added to a parameter's gradient now."""

    def _require_applied(self) -> None:
        """Raise :class:`ScriptError` where a step of the round went without the correction."""
        if not self._attached:
            raise ScriptError(f"{self.name} needs rnd.wrap(optimizer) before the first step of the round")
        if self._meter.uncorrected:
            raise ScriptError(
                f"{self.name}: a step of {self._meter.uncorrected} was not corrected: give each optimizer of the round"
                " to rnd.wrap() before its first step, a new one too"
            )


class DriftCorrection(GradientCorrection):
    """Adds to each gradient, before every step, what keeps clients from drifting apart; remembers something of it."""

    def __init__(self, names: Names, memory: State) -> None:
        super().__init__(names)
        self._memory = dict(memory)
        self._tracked: dict[str, torch.Tensor] = {}
        self._anchors: dict[str, torch.Tensor] = {}
        self._corrections: dict[str, torch.Tensor] = {}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        super().attach(optimizer)
        named = [
            (name, parameter)
            for parameter in parameters_of(optimizer)
            if (name := self._names.find(parameter)) is not None
        ]
        for name, parameter in named:
            if name not in self._tracked:
                whole = self._names.whole(parameter)
                self._tracked[name] = whole
                if name in self._memory and self._memory[name].shape != whole.shape:
                    log.warning("%s remembers %s in another shape: it begins anew", self.name, name)
                    del self._memory[name]
                self._anchors[name] = whole.detach().clone()
                constant = self.constant(name)
                if constant is not None:
                    self._corrections[name] = constant.to(whole)
        self._terms.hook(optimizer, (parameter for _, parameter in named))

    @abstractmethod
    def constant(self, name: str) -> torch.Tensor | None:
        """Return what is added to the gradient of the tensor of that name in every step of the round."""

    def moving(self, parameter: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor | None:
        """Return what is added besides and changes with each step. ``anchor``: the parameter when the round began."""
        return None

    def remembered(self, name: str, change: torch.Tensor) -> torch.Tensor:
        """Return what to remember of a parameter, given its change in the round; both in single precision or better."""
        raise NotImplementedError

    def outcome(self) -> State | None:
        self._attached = bool(self._tracked)
        self._require_applied()
        result = dict(self._memory)
        with torch.no_grad():
            for name, parameter in self._tracked.items():
                wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
                change = parameter.detach().to("cpu", wide) - self._anchors[name].to("cpu", wide)
                result[name] = self.remembered(name, change)
        return result

    def close(self) -> None:
        super().close()
        self._anchors.clear()
        self._corrections.clear()

    def _terms_of(self, parameter: torch.Tensor) -> Iterator[torch.Tensor]:
        name = self._names.find(parameter)
        if name is None or name not in self._anchors:
            return
        if name in self._corrections:
            yield self._names.part(parameter, self._corrections[name])
        if (term := self.moving(parameter, self._names.part(parameter, self._anchors[name]))) is not None:
            yield term


def _positive(value: float, algorithm: str) -> float:
    if value <= 0:
        raise ScriptError(f"{algorithm} counts the steps of torch optimizers, and none of this model's took one")
    return value
