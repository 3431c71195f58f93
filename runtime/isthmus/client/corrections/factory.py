"""The corrections that the strategies ask of their clients."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from isthmus_contracts.pb import federation_pb2 as pb

from ...tensors import State
from ..session.session import Session
from ..session.transfer import FinishedUpdate, pull_companion
from ..state.parameter_names import Names
from ..state.persistent_tensors import Memory
from .base import Correction, CountedSteps, InitialLoss
from .feddyn import DynamicRegularizer
from .proximal import ProximalTerm
from .scaffold import ControlVariates

_REMEMBERING = ("SCAFFOLD", "FedDyn")
_ACCOMPANIED = ("SCAFFOLD",)


@dataclass(frozen=True)
class Ingredients:
    """The tensors, beside the model, that a round's correction is made of. Every rank of a client needs them."""

    memory: State = field(default_factory=dict)
    companion: State = field(default_factory=dict)


class Corrections:
    """Gathers what each round's correction needs, and keeps what some of them remember from round to round."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._memory: Memory | None = None

    def gather(self, offer: pb.Offer) -> Ingredients:
        """What an offer's correction needs. Raises :class:`OutdatedError` where the aggregator has moved on."""
        if offer.algorithm in _REMEMBERING and self._memory is None:
            self._memory = Memory(offer.algorithm, self._session.job_uid, self._session.context)
        return Ingredients(
            self._memory.tensors if self._memory is not None else {},
            pull_companion(self._session, offer) if offer.algorithm in _ACCOMPANIED else {},
        )

    def accepted(self, update: FinishedUpdate) -> None:
        """The aggregator counts the update: what belongs to it is remembered. Again: nothing changes."""
        if self._memory is not None and update.remembered is not None:
            self._memory.advance(update.remembered, update.round)


def correction_of(offer: pb.Offer, names: Names, evaluation: Mapping[str, float], aids: Ingredients) -> Correction:
    """The correction of an offer's round. ``evaluation`` is what was measured of its model."""

    def parameter(name: str) -> float:
        return float(offer.parameters[name])

    makers: dict[str, Callable[[], Correction]] = {
        "FedProx": lambda: ProximalTerm(parameter("mu"), names) if parameter("mu") else Correction(),
        "FedNova": lambda: CountedSteps(names),
        "QFedAvg": lambda: InitialLoss(evaluation),
        "SCAFFOLD": lambda: ControlVariates(names, aids.memory, aids.companion),
        "FedDyn": lambda: DynamicRegularizer(names, aids.memory, parameter("alpha")),
    }
    return makers.get(offer.algorithm, Correction)()
