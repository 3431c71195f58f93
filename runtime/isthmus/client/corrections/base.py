"""Changes that a strategy makes to a client's training, and the numbers that the strategy requires of the client."""

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch

from ...tensors import State
from ..errors import ScriptError
from ..state.parameter_names import ParameterNames
from .gradient_terms import GradientTerms
from .optimizers import parameters_of
from .step_meter import StepMeter

log = logging.getLogger("isthmus")


class Correction:
    """Correction of one round. This base class, for strategies without a client-side part, does nothing."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Hook into an optimizer, before its first step of the round."""

    def scalars(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the numbers for the update's header after training. Raises ``ValueError`` if they are not known."""
        return {}

    def updated_state(self) -> State | None:
        """Return the state to keep if the update is accepted, or ``None``. Must be called before :meth:`close`."""
        return None

    def close(self) -> None:
        """Remove the correction at the end of the round."""


class CountedSteps(Correction):
    """FedNova: reports the number of steps."""

    def __init__(self, names: ParameterNames) -> None:
        self._meter = StepMeter(names)

    def scalars(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {"steps": positive(self._meter.steps, "FedNova")}

    def close(self) -> None:
        self._meter.close()


class InitialLoss(Correction):
    """q-FedAvg: reports the loss at the global model, from the script's metrics or its evaluation function."""

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
    """Correction that adds terms to gradients before every optimizer step."""

    name = ""

    def __init__(self, names: ParameterNames) -> None:
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
        """Yield the terms to add to a parameter's gradient in this step."""

    def _require_applied(self) -> None:
        """Raise :class:`ScriptError` if a step of the round was not corrected."""
        if not self._attached:
            raise ScriptError(f"{self.name} needs rnd.wrap(optimizer) before the first step of the round")
        if self._meter.uncorrected:
            raise ScriptError(
                f"{self.name}: a step of {self._meter.uncorrected} was not corrected: give each optimizer of the round"
                " to rnd.wrap() before its first step, a new one too"
            )


class DriftCorrection(GradientCorrection):
    """Correction, with state, that adds terms to gradients which keep clients from drifting apart."""

    def __init__(self, names: ParameterNames, memory: State) -> None:
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
                    log.warning("%s: the stored state of %s has another shape; starting without it", self.name, name)
                    del self._memory[name]
                self._anchors[name] = whole.detach().clone()
                constant = self.constant(name)
                if constant is not None:
                    self._corrections[name] = constant.to(whole)
        self._terms.hook(optimizer, (parameter for _, parameter in named))

    @abstractmethod
    def constant(self, name: str) -> torch.Tensor | None:
        """Return the term to add to the named tensor's gradient in every step of the round."""

    def moving(self, parameter: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor | None:
        """Return a further term, which changes with each step. ``anchor``: the parameter at the start of the round."""
        return None

    def next_state(self, name: str, change: torch.Tensor) -> torch.Tensor:
        """Return the state of a parameter after a change of it in the round, both in single precision or better."""
        raise NotImplementedError

    def updated_state(self) -> State | None:
        self._attached = bool(self._tracked)
        self._require_applied()
        result = dict(self._memory)
        with torch.no_grad():
            for name, parameter in self._tracked.items():
                wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
                change = parameter.detach().to("cpu", wide) - self._anchors[name].to("cpu", wide)
                result[name] = self.next_state(name, change)
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


def positive(value: float, algorithm: str) -> float:
    if value <= 0:
        raise ScriptError(f"{algorithm} counts the steps of torch optimizers, and none of this model's took one")
    return value
