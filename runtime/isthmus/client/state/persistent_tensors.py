"""Tensors that a client keeps from round to round: a correction's state, or an error-feedback residual."""

import logging
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from isthmus_contracts import identities

from ...tensors import State
from ..context import Context

log = logging.getLogger("isthmus")


class PersistentTensors:
    """Tensors in memory and, if there is a scratch directory (``ISTHMUS_SCRATCH``), in a file for the client's restart.

    The file is replaced atomically. Errors of the file system are logged, and do not end the client.
    """

    def __init__(self, name: str, job_uid: str, context: Context) -> None:
        self.tensors: State = {}
        self._name = name
        self._job_uid = job_uid
        scratch = os.environ.get(identities.ENV_SCRATCH)
        self._path = Path(scratch) / f"{name.lower()}-{context.pool}-{context.index}.safetensors" if scratch else None
        if self._path is not None and self._path.exists():
            self._load(self._path)

    def advance(self, tensors: State, round_number: int) -> None:
        """Store new tensors, once the update of this round, to which they belong, has been accepted."""
        self.tensors = tensors
        if self._path is None:
            return
        partial = self._path.with_suffix(".partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            try:
                partial.touch(mode=0o600)  # it reveals as much about the client's data as the updates do
                save_file(contiguous, partial, {"job_uid": self._job_uid, "round": str(round_number)})
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                partial.replace(self._path)
            finally:
                partial.unlink(missing_ok=True)  # on a full disk a partial file would take the remaining space
        except Exception as error:
            # Training continues: only a restarted client misses the file.
            log.warning("cannot store %s in %s: %s", self._name, self._path.parent, error)

    def _load(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("job_uid") != self._job_uid:
                    return  # of another job: replaced at the first acceptance
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            log.warning("%s is unreadable (%s); starting with empty state", path, error)
            return
        log.info("loaded %s of round %s from %s", self._name, metadata.get("round", "?"), path.parent)
