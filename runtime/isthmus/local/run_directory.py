"""The directory of a local run: the aggregator's state, the processes' logs, and who owns them."""

import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from isthmus_contracts.manifests.manifest import FederatedJob

_MODEL_SUFFIXES = (".pt", ".safetensors")
_CHECKPOINT = re.compile(r"round-(\d+)\.safetensors")


class RunDirectoryError(Exception):
    """The directory cannot be used. ``str()`` is one line that says why, and what to do."""


class RunDirectory:
    """Checkpoints, rounds.jsonl and the final model (see the aggregator's CheckpointStore); job.json; logs/; tls/;
    scratch/, which is the clients' own;
    code/, the files of task.code."""

    def __init__(self, root: Path) -> None:
        """All paths are absolute: they are handed to processes that may run, or go, elsewhere."""
        self._given, self.root = root, root.resolve()
        root = self.root
        self.job_file = root / "job.json"
        self.logs = root / "logs"
        self.tls = root / "tls"
        self.scratch = root / "scratch"
        self.code = root / "code"
        self.ports_file = root / "ports.json"
        self.rounds_file = root / "rounds.jsonl"
        self.model = root / "model.pt"
        self.best_model = root / "model-best.pt"

    @contextmanager
    def opened(self, job: FederatedJob, *, resume: bool, overwrite: bool) -> Iterator[str]:
        """Prepares it for a run and holds it until the run is over; yields the job's uid.

        Raises :class:`RunDirectoryError` rather than touch what it should not.
        """
        try:
            created = not self.root.exists()
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise RunDirectoryError(f"{error.filename}: {error.strerror}") from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunDirectoryError(f"{self._given} is in use by another run; choose another with --dir") from None
            try:
                uid = self._prepare(job, resume=resume, overwrite=overwrite)
            except RunDirectoryError:
                if created:  # leave no trace of a typing error
                    shutil.rmtree(self.root)
                raise
            try:
                yield uid
            finally:
                # The keys are worth nothing once the run is over.
                shutil.rmtree(self.tls, ignore_errors=True)
                self.ports_file.unlink(missing_ok=True)
        finally:
            os.close(lock)

    def _prepare(self, job: FederatedJob, *, resume: bool, overwrite: bool) -> str:
        previous = self._previous()
        if previous is None:
            if any(path.name != ".lock" for path in self.root.iterdir()):
                raise RunDirectoryError(f"{self._given} is not empty and holds no run; choose another with --dir")
            if resume:
                raise RunDirectoryError(f"{self._given} holds no run to resume")
            uid = str(uuid.uuid4())
        elif resume:
            uid, name = previous
            if name != job.name:
                raise RunDirectoryError(
                    f"{self._given} holds a run of job {name}, not of {job.name}; choose another with --dir"
                )
        elif overwrite:
            self._clear()
            uid = str(uuid.uuid4())
        else:
            finished = self.finished(job.spec.rounds)
            state = "a finished run" if finished else f"a run that ended after round {self.committed}"
            choices = "--resume goes on with it, --overwrite starts over, --dir chooses another place"
            raise RunDirectoryError(f"{self._given} holds {state}: {choices}")
        self.logs.mkdir(exist_ok=True)
        shutil.rmtree(self.tls, ignore_errors=True)
        self.ports_file.unlink(missing_ok=True)
        spec = job.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        content = {"name": job.name, "namespace": job.namespace, "uid": uid, "spec": spec}
        partial = self.job_file.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.job_file)
        return uid

    def lay_code(self, files: Mapping[str, bytes]) -> Path | None:
        """Lays out the job's files; where its processes run, then."""
        if not files:
            return None
        shutil.rmtree(self.code, ignore_errors=True)
        self.code.mkdir()
        for name, content in files.items():
            (self.code / name).write_bytes(content)
        return self.code

    def shown(self, path: Path) -> Path:
        """A path of the run as the user would write it, who may have given a relative one for its directory."""
        return self._given / path.relative_to(self.root)

    @property
    def committed(self) -> int:
        """The newest round with a checkpoint; 0 where there is none."""
        found = (_CHECKPOINT.fullmatch(path.name) for path in (self.root / "checkpoints").glob("*"))
        return max((int(match[1]) for match in found if match), default=0)

    def finished(self, rounds: int) -> bool:
        """Return whether a run of so many rounds has nothing left to do."""
        return self.model.exists() and self.committed >= rounds

    def _previous(self) -> tuple[str, str] | None:
        """Uid and name of the run that is here, if one is."""
        try:
            content = json.loads(self.job_file.read_text(encoding="utf-8"))
            return str(content["uid"]), str(content["name"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunDirectoryError(
                f"{self.shown(self.job_file)}: not a job file ({error}); choose another with --dir"
            ) from None

    def _clear(self) -> None:
        """Removes what a run makes, and nothing else that may lie here. The job file goes last: it marks the rest."""
        for directory in (
            self.root / "checkpoints",
            self.root / "tensorboard",
            self.logs,
            self.tls,
            self.scratch,
            self.code,
        ):
            shutil.rmtree(directory, ignore_errors=True)
        models = [model.with_suffix(suffix) for model in (self.model, self.best_model) for suffix in _MODEL_SUFFIXES]
        for file in (self.rounds_file, *models, self.job_file):
            file.unlink(missing_ok=True)
