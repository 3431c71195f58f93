"""Corrections by the name of the strategy, and the state that they keep between rounds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from isthmus_contracts.pb import federation_pb2 as pb

from ...tensors import State
from ..session.session import Session
from ..session.transfer import FinishedUpdate, pull_companion
from ..state.parameter_names import ParameterNames
from ..state.persistent_tensors import PersistentTensors
from .base import Correction, CountedSteps, InitialLoss
from .feddyn import DynamicRegularizer
from .proximal import ProximalTerm
from .scaffold import ControlVariates

# Algorithms whose clients keep state from round to round, and those that send auxiliary tensors with the model.
_STATEFUL = ("SCAFFOLD", "FedDyn")
_WITH_COMPANION = ("SCAFFOLD",)


@dataclass(frozen=True)
class CorrectionInputs:
    """Tensors, beside the model, that a round's correction needs. Every rank of a client needs them."""

    memory: State = field(default_factory=dict)
    """The client's own state from earlier rounds."""
    companion: State = field(default_factory=dict)
    """Auxiliary tensors that the strategy sends with the model."""


class CorrectionState:
    """The inputs of each round's correction, with the state that some corrections keep from round to round."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._memory: PersistentTensors | None = None

    def inputs(self, offer: pb.Offer) -> CorrectionInputs:
        """Return an offer's inputs. Raises :class:`OutdatedError` if the aggregator has moved on."""
        if offer.algorithm in _STATEFUL and self._memory is None:
            self._memory = PersistentTensors(offer.algorithm, self._session.job_uid, self._session.context)
        return CorrectionInputs(
            self._memory.tensors if self._memory is not None else {},
            pull_companion(self._session, offer) if offer.algorithm in _WITH_COMPANION else {},
        )

    def on_accepted(self, update: FinishedUpdate) -> None:
        """Store the state that belongs to an accepted update. Calling it again has no effect."""
        if self._memory is not None and update.updated_state is not None:
            self._memory.advance(update.updated_state, update.round)


def make_correction(
    offer: pb.Offer, names: ParameterNames, evaluation: Mapping[str, float], inputs: CorrectionInputs
) -> Correction:
    """Return the correction of an offer's round. ``evaluation``: metrics of its model at this client."""

    def parameter(name: str) -> float:
        return float(offer.parameters[name])

    makers: dict[str, Callable[[], Correction]] = {
        "FedProx": lambda: ProximalTerm(parameter("mu"), names) if parameter("mu") else Correction(),
        "FedNova": lambda: CountedSteps(names),
        "QFedAvg": lambda: InitialLoss(evaluation),
        "SCAFFOLD": lambda: ControlVariates(names, inputs.memory, inputs.companion),
        "FedDyn": lambda: DynamicRegularizer(names, inputs.memory, parameter("alpha")),
    }
    return makers.get(offer.algorithm, Correction)()
