"""Error feedback: the client keeps the values that its sparse updates have left out so far.

Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes" (2019), algorithm 2: the
residual is added to the next update before compression, and the values left out then are the next residual. It
advances only when an update is accepted: a refused one never became part of the model.
"""

import logging

from ...codecs import Residual
from ..context import Context
from ..state.persistent_tensors import PersistentTensors

log = logging.getLogger("isthmus")


class ErrorFeedback:
    """One client's residual.

    After a crash between an update's acceptance and the replacement of the file, the residual is one round old: the
    values that the round left out are lost, and those that it took from the residual are sent once more.
    """

    def __init__(self, job_uid: str, context: Context) -> None:
        self._memory = PersistentTensors("residual", job_uid, context)
        self.residual: Residual | None = None
        if self._memory.tensors:
            try:
                self.residual = Residual(self._memory.tensors)
            except ValueError as error:
                log.warning("the stored residual is unusable (%s); starting with an empty one", error)

    def advance(self, residual: Residual, round_number: int) -> None:
        """Store the residual of an accepted update of this round."""
        self.residual = residual
        self._memory.advance(residual.tensors, round_number)
