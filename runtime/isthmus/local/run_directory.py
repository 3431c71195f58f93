"""Directory of a local run: the aggregator's state, logs, and the run's identity."""

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
from isthmus_contracts.process import files

_MODEL_SUFFIXES = (".pt", ".safetensors")
_CHECKPOINT = re.compile(r"round-(\d+)\.safetensors")


class RunDirectoryError(Exception):
    """The directory cannot be used. ``str()`` is one line with the reason and the remedy."""


class RunDirectory:
    """Paths in a run's directory, and its life cycle.

    It holds checkpoints, rounds.jsonl and the final model (see the aggregator's CheckpointStore), job.json, logs/,
    tls/, scratch/ for the clients, and code/ with the files of task.code.
    """

    def __init__(self, root: Path) -> None:
        """All paths are made absolute, since processes may have other working directories."""
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
        """Prepare the directory and lock it until the run is over; yield the job's uid.

        Raises :class:`RunDirectoryError` if it holds other files or another run, which are left untouched.
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
                if created:  # the user may have mistyped the path
                    shutil.rmtree(self.root)
                raise
            try:
                yield uid
            finally:
                # The keys are useless after the run.
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
            choices = "--resume continues it, --overwrite starts over, --dir chooses another directory"
            raise RunDirectoryError(f"{self._given} holds {state}: {choices}")
        self.logs.mkdir(exist_ok=True)
        shutil.rmtree(self.tls, ignore_errors=True)
        self.ports_file.unlink(missing_ok=True)
        spec = job.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        content = {"name": job.name, "namespace": job.namespace, "uid": uid, "spec": spec}
        files.replace(self.job_file, (json.dumps(content, indent=1) + "\n").encode())
        return uid

    def write_code(self, files: Mapping[str, bytes]) -> Path | None:
        """Write the job's files; return their directory, in which its processes run, or ``None`` without files."""
        if not files:
            return None
        shutil.rmtree(self.code, ignore_errors=True)
        self.code.mkdir()
        for name, content in files.items():
            (self.code / name).write_bytes(content)
        return self.code

    def shown(self, path: Path) -> Path:
        """Return a path of the run as shown to the user: relative if the user gave a relative directory."""
        return self._given / path.relative_to(self.root)

    @property
    def committed(self) -> int:
        """The newest round with a checkpoint, or 0."""
        found = (_CHECKPOINT.fullmatch(path.name) for path in (self.root / "checkpoints").glob("*"))
        return max((int(match[1]) for match in found if match), default=0)

    def finished(self, rounds: int) -> bool:
        """Return whether a run of this number of rounds is complete."""
        return self.model.exists() and self.committed >= rounds

    def _previous(self) -> tuple[str, str] | None:
        """Return uid and name of the run in this directory, if any."""
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
        """Remove the files that a run creates, and no others. The job file is removed last, since it marks a run."""
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
