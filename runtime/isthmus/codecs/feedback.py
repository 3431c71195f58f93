"""Error feedback: what sparse updates have left out so far, kept by the client that left it out.

Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes" (2019), algorithm 2: the
residual is added to the next update before it is compressed, and what that leaves out is the next residual. It
advances only when an update was accepted: a refused one never reached the model.
"""

import logging
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .residual import Residual

log = logging.getLogger("isthmus")


class ErrorFeedback:
    """One client's residual, in memory and, given a scratch directory, in a file that a restart finds again.

    A crash between an update's acceptance and the file's replacement leaves the file one round behind; the loss is what
    that round left out. Nothing is ever wrong with the file itself: it appears whole or not at all.
    """

    def __init__(self, scratch: Path | None, job_uid: str, pool: str, index: int) -> None:
        self.residual: Residual | None = None
        self._job_uid = job_uid
        self._path = None if scratch is None else scratch / f"residual-{pool}-{index}.safetensors"
        if self._path is not None and self._path.exists():
            self._load(self._path)

    def advance(self, residual: Residual, round_number: int) -> None:
        """The update of this round, which left ``residual`` out, was accepted."""
        self.residual = residual
        if self._path is None:
            return
        partial = self._path.with_suffix(".partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_file(residual.tensors, partial, {"job_uid": self._job_uid, "round": str(round_number)})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(self._path)
        except (OSError, SafetensorError) as error:
            # The run goes on: only a restart would miss it.
            log.warning("the error feedback could not be kept in %s: %s", self._path.parent, error)

    def _load(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("job_uid") != self._job_uid:
                    return  # another job's: replaced at the first acceptance
                self.residual = Residual({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("%s cannot be read (%s): the error feedback begins anew", path, error)
            return
        log.info("error feedback of round %s found in %s", metadata.get("round", "?"), path.parent)
