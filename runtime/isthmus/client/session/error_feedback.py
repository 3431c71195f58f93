"""Error feedback: what sparse updates have left out so far, kept by the client that left it out.

Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes" (2019), algorithm 2: the
residual is added to the next update before it is compressed, and what that leaves out is the next residual. It
advances only when an update was accepted: a refused one never reached the model.
"""

import logging

from ...codecs import Residual
from ..context import Context
from ..state.persistent_tensors import Memory

log = logging.getLogger("isthmus")


class ErrorFeedback:
    """One client's residual.

    A crash between an update's acceptance and the replacement of the memory's file leaves that one round behind: what
    the round left out is lost, and what it took from the residual is sent once more.
    """

    def __init__(self, job_uid: str, place: Context) -> None:
        self._memory = Memory("residual", job_uid, place)
        self.residual: Residual | None = None
        if self._memory.tensors:
            try:
                self.residual = Residual(self._memory.tensors)
            except ValueError as error:
                log.warning("a residual that cannot be used (%s): the error feedback begins anew", error)

    def advance(self, residual: Residual, round_number: int) -> None:
        """The update of this round, which left ``residual`` out, was accepted."""
        self.residual = residual
        self._memory.advance(residual.tensors, round_number)
