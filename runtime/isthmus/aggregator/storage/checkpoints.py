"""Checkpoints: each committed round as one safetensors file that appears whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from safetensors import SafetensorError

from ...tensors import State, snapshot
from ...views import View, expanded, from_text
from . import recycled_file, safetensors_file
from .safetensors_file import HeaderError, TensorFile

FINAL, BEST = "model", "model-best"
_SUFFIXES = (".pt", ".safetensors")
_PATTERN = re.compile(r"round-(\d+)\.safetensors")


VIEWS = "views"
"""Name of the checkpoint's note that holds :attr:`Checkpoint.views`."""


class CheckpointError(Exception):
    """The checkpoints in the state directory cannot be used. ``str()`` says why and how to mend it."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed global model."""

    round: int
    state: State
    """Backed by the file where it is large: it takes memory only where it is touched."""
    file: TensorFile
    strategy: State = field(default_factory=dict)
    """What the strategy keeps from round to round."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What else was committed with it, by name."""

    @property
    def views(self) -> tuple[View, ...]:
        """The names that share memory with one of the tensors: those of ``state`` and these are the model's."""
        return from_text(self.notes.get(VIEWS, "[]"))

    @property
    def digest(self) -> str:
        """The model's identity in the protocol."""
        return self.file.digest


@dataclass
class RoundRecord:
    """One line of rounds.jsonl: what a round came to."""

    round: int
    seconds: float
    updates: int
    examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    """Training metrics of the round (train_...) and, once the clients have measured it, evaluation of its model."""
    time: float = 0.0
    """Of the commit, in seconds since the epoch."""
    selected: int = 0
    """Clients that took part. Of these ``updates`` handed in, the others were late or failed."""
    late: int = 0
    """Clients that were still at it when the round ended."""
    failed: int = 0
    """Clients that were gone, or whose update was refused."""
    stale_updates: int = 0
    """Of the updates, those of earlier rounds."""
    pools: dict[str, int] = field(default_factory=dict)
    """Updates by pool."""
    received_bytes: int = 0
    """Of whole updates, as encoded."""
    sent_bytes: int = 0
    """Of models, as encoded, while the round was in progress."""
    privacy: dict[str, float] = field(default_factory=dict)
    """Where the job asks for differential privacy: ``epsilon`` and ``delta`` of all models up to this one, the
    ``rounds`` and the ``mu_squared`` that they follow from, and the ``clipped_ratio`` of this round's updates."""
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    """``mean`` and ``max`` of the seconds that each stage took: over the clients (wait, pull, evaluate, train, encode),
    over the updates (push, fold), and of the checkpoint."""
    confirmed: dict[str, float] = field(default_factory=dict)
    """How good the model is at least by the objective's metric, as more than half of the clients asked have it; empty
    while too few have measured it."""

    def text(self) -> str:
        """The record as a line of JSON."""
        return json.dumps(self.__dict__)

    @classmethod
    def of_text(cls, line: str) -> "RoundRecord":
        """Return what :meth:`text` wrote. Fields may be missing or unknown. Raises ``ValueError`` for anything else."""
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{name: value for name, value in json.loads(line).items() if name in known})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a record of a round: {error}") from None


class CheckpointStore:
    """The state directory of an aggregator.

    ``checkpoints/round-000007.safetensors``: the newest ``keep`` committed models and the best one, and beside each,
    where the strategy has a state, ``round-000007.strategy.safetensors``. ``rounds.jsonl``: a record for each round.
    ``model.safetensors`` and ``model.pt``: the job's model, once training is complete. ``model-best.safetensors`` and
    ``model-best.pt``: the best one by the objective's metric, where a metric of that name was measured.
    """

    def __init__(self, directory: Path, job_uid: str, keep: int, former: str = "") -> None:
        """``former``: the uid of an earlier job whose checkpoints this one continues."""
        self.directory = directory
        self._checkpoints = directory / "checkpoints"
        self._records = directory / "rounds.jsonl"
        self._spare = self._checkpoints / f"model{recycled_file.SUFFIX}"
        self._strategy_spare = self._checkpoints / f"strategy{recycled_file.SUFFIX}"
        self._job_uid = job_uid
        self._former = former
        self._keep = keep

    def open(self) -> None:
        """Makes the directory usable and drops what a crash left half-written. Raises :class:`CheckpointError`."""
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            for pattern in ("*.partial", f"*{recycled_file.SUFFIX}"):
                for leftover in self.directory.rglob(pattern):
                    leftover.unlink()
        except OSError as error:
            raise CheckpointError(f"{error.filename}: {error.strerror}; the state directory must be writable") from None

    def save(
        self, round_number: int, state: State, strategy: State | None = None, notes: Mapping[str, str] | None = None
    ) -> Checkpoint:
        """Writes a checkpoint durably: written, fsynced, renamed, directory fsynced. Raises ``OSError``, and
        :class:`CheckpointError` for one that could not be read back, which gets no name.

        The strategy's state is there before the model is: the model's appearance commits both.
        """
        path, beside = self.path(round_number), self._strategy_path(round_number)
        if strategy:
            self._write(strategy, beside, self._strategy_spare, round_number)
        else:
            beside.unlink(missing_ok=True)  # of a round that was never committed
        file = self._write(state, path, self._spare, round_number, notes)
        kept = snapshot(state) if file.size <= safetensors_file.SMALL_BYTES else safetensors_file.mapped(path)
        return Checkpoint(round_number, kept, file, strategy or {}, notes or {})

    def retire(self, wanted: Collection[int] = ()) -> None:
        """Drop the models that are not among the newest any more, nor of a ``wanted`` round. Raises ``OSError``."""
        for old in self.numbers()[: -self._keep]:
            if old in wanted:
                continue
            for path, spare in ((self.path(old), self._spare), (self._strategy_path(old), self._strategy_spare)):
                with suppress(FileNotFoundError):  # many strategies have no state
                    path.rename(spare)

    def _write(
        self, state: State, path: Path, spare: Path, round_number: int, notes: Mapping[str, str] | None = None
    ) -> TensorFile:
        metadata = {**(notes or {}), "format": "pt", "round": str(round_number), "job_uid": self._job_uid}
        with _publishing(path) as partial:
            recycled_file.recycle(spare, partial)
            try:
                file = safetensors_file.write(partial, state, metadata)
            except HeaderError as error:
                raise CheckpointError(f"{path} cannot be written: it would have {error}") from None
        return replace(file, path=path)

    def latest(self) -> Checkpoint | None:
        """The newest committed model, or ``None``. Raises :class:`CheckpointError` for somebody else's files."""
        numbers = self.numbers()
        return self.load(numbers[-1]) if numbers else None

    def load(self, number: int) -> Checkpoint:
        """A committed model. Raises :class:`CheckpointError` where it cannot be read, or is somebody else's."""
        path, beside = self.path(number), self._strategy_path(number)
        file, state, metadata = _read(path, path)
        owner = metadata.get("job_uid")
        if owner != self._job_uid and not (owner and owner == self._former):
            raise CheckpointError(
                f"{self._checkpoints} holds checkpoints of another job (uid {owner}); use an empty directory"
            )
        strategy = _read(beside, path)[1] if beside.exists() else {}
        return Checkpoint(number, state, file, strategy, metadata)

    def write_final(self, checkpoint: Checkpoint, name: str = FINAL) -> tuple[Path, str]:
        """Write a model for plain PyTorch and safetensors users; return the latter's path and SHA-256.

        In the ``.pt`` file names share memory as in the script's model; safetensors knows of no such thing.
        """
        state = expanded(checkpoint.state, checkpoint.views)
        plain, path = self.directory / f"{name}.pt", self.directory / f"{name}.safetensors"
        with _publishing(plain) as partial:
            safetensors_file.save_plain(partial, state)
        with _publishing(path) as partial:
            recycled_file.recycle(self._spare, partial)
            safetensors_file.write(partial, state, {"format": "pt", "round": str(checkpoint.round)})
        self._strategy_spare.unlink(missing_ok=True)
        return path, safetensors_file.sha256_of(path)

    def write_best(self, number: int | None, final: int) -> tuple[Path, str] | None:
        """Write the best model likewise, where there is one; it may be the final one, which is there already.

        Raises :class:`CheckpointError` and ``OSError``.
        """
        for suffix in _SUFFIXES:  # of a run that had other rounds
            (self.directory / f"{BEST}{suffix}").unlink(missing_ok=True)
        if number is None:
            return None
        if number != final:
            return self.write_final(self.load(number), BEST)
        for suffix in _SUFFIXES:
            here, there = self.directory / f"{FINAL}{suffix}", self.directory / f"{BEST}{suffix}"
            with _publishing(there) as partial:
                try:
                    partial.hardlink_to(here)
                except OSError:  # a volume without links
                    shutil.copyfile(here, partial)
        return there, safetensors_file.sha256_of(there)

    def records(self, up_to: int | None = None) -> list[RoundRecord]:
        """The records of rounds 1 to ``up_to``: later ones belong to rounds whose checkpoints were removed."""
        records: dict[int, RoundRecord] = {}
        if self._records.exists():
            for line in self._records.read_text(encoding="utf-8").splitlines():
                try:
                    record = RoundRecord.of_text(line)
                except ValueError:
                    continue  # the last line, torn by a crash
                if up_to is None or record.round <= up_to:
                    records[record.round] = record
        return [records[number] for number in sorted(records)]

    def append(self, record: RoundRecord) -> None:
        """Adds a record; a later one of the same round replaces it when read. Raises ``OSError``."""
        line = record.text().encode() + b"\n"
        with self._records.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a crash or a full disk has torn the last line: it must not take ours along
                    line = b"\n" + line
            file.write(line)

    def numbers(self) -> list[int]:
        """The rounds whose models are there, in their order."""
        found = (_PATTERN.fullmatch(path.name) for path in self._checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, number: int) -> Path:
        """Return where a round's model is, or would be."""
        return self._checkpoints / f"round-{number:06d}.safetensors"

    def _strategy_path(self, number: int) -> Path:
        return self._checkpoints / f"round-{number:06d}.strategy.safetensors"


def _read(path: Path, model: Path) -> tuple[TensorFile, State, dict[str, str]]:
    """A file that belongs to the checkpoint ``model``, its tensors and metadata. Raises :class:`CheckpointError`."""
    try:
        return safetensors_file.read(path)
    except (SafetensorError, OSError, ValueError) as error:
        it = "it" if path == model else model
        raise CheckpointError(f"{path} cannot be read ({error}); remove {it} to go on from the one before") from None


@contextmanager
def _publishing(path: Path) -> Iterator[Path]:
    """Where to write a file durably, which then gets its name, durably. One that fails leaves the room that it took."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.rename(path)
    except (OSError, CheckpointError):
        partial.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
