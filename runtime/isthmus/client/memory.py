"""Tensors that a client keeps from round to round for a correction."""

import logging
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from isthmus_contracts import identities

from ..tensors import State
from .context import Context

log = logging.getLogger("isthmus")


class Memory:
    """In memory, and where there is a scratch directory (``ISTHMUS_SCRATCH``) also there, for the client's restart."""

    def __init__(self, algorithm: str, job_uid: str, place: Context) -> None:
        self.tensors: State = {}
        self._job_uid = job_uid
        scratch = os.environ.get(identities.ENV_SCRATCH)
        self._path = Path(scratch) / f"{algorithm.lower()}-{place.pool}-{place.index}.safetensors" if scratch else None
        if self._path is not None and self._path.exists():
            self._load(self._path)

    def advance(self, tensors: State) -> None:
        """Takes new tensors up, once the update that belongs to them has been accepted."""
        self.tensors = tensors
        if self._path is None:
            return
        partial = self._path.with_suffix(".partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, {"job_uid": self._job_uid})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(self._path)
        except (OSError, SafetensorError) as error:
            # The run goes on: only a restart would miss it.
            log.warning("the correction's state could not be kept in %s: %s", self._path.parent, error)

    def _load(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("job_uid") != self._job_uid:
                    return  # another job's: replaced at the first acceptance
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            log.warning("%s cannot be read (%s): the correction begins anew", path, error)
