"""Interface of the sums that instances open: of the updates of a round, or of the final model's measurements."""

from collections.abc import Sequence
from typing import Protocol

from isthmus_contracts.pb import secure_aggregation_pb2 as sa

from ...strategies import Update
from ...tensors import State
from ..state.round_sums import RoundSums


class Subject(Protocol):
    """A sum of masked tensors. It is used by one thread at a time."""

    purpose: "sa.SecureBegin.Purpose.ValueType"

    def arrange(self, number: int, model: State) -> sa.SecureLayout:
        """Return the layout of a round on top of ``model``: the same whenever it is called for that round."""

    def basis(self, number: int, model: State) -> str:
        """Return the digest of all that the clients start from in a round on top of ``model``."""

    def begin(self, model: State) -> None:
        """Start a sum of nothing. Raise ``OSError`` if there is no room for it."""

    def adopt(self, model: State, accumulator: State, contributors: int) -> None:
        """Go on with a sum that has been made before."""

    def accept(self, update: Update) -> None:
        """Add a masked update."""

    @property
    def accumulator(self) -> State:
        """The masked sum."""

    def unmask(self, plan: Sequence[tuple[bytes, int]], threads: int) -> None:
        """Remove masks, given by their keys and signs, from the sum, in place.

        Raises :class:`StrategyError` if the sum is worthless.
        """

    @property
    def opened(self) -> RoundSums:
        """The numbers of an unmasked sum."""
