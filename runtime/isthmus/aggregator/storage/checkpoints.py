"""Checkpoints: each committed round as one safetensors file, written atomically."""

import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError

from ...tensors import State, snapshot
from ...views import View, expanded, from_text
from . import recycled_file, safetensors_file
from .round_record import RoundRecord
from .safetensors_file import HeaderError, TensorFile

FINAL, BEST = "model", "model-best"
_SUFFIXES = (".pt", ".safetensors")
_PATTERN = re.compile(r"round-(\d+)\.safetensors")
VIEWS = "views"
"""Name of the checkpoint's note that holds :attr:`Checkpoint.views`."""


class CheckpointError(Exception):
    """The checkpoints in the state directory cannot be used. ``str()`` has the reason and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed global model."""

    round: int
    state: State
    """Tensors. Large ones are backed by the file: only pages that are accessed occupy memory."""
    file: TensorFile
    strategy: State = field(default_factory=dict)
    """Tensors that the strategy keeps from round to round."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Further data that was committed with the model, by name."""

    @property
    def views(self) -> tuple[View, ...]:
        """Names that share memory with one of the tensors. The model has these names and those in ``state``."""
        return from_text(self.notes.get(VIEWS, "[]"))

    @property
    def digest(self) -> str:
        """The model's identity in the protocol."""
        return self.file.digest


class CheckpointStore:
    """The state directory of an aggregator.

    ``checkpoints/round-000007.safetensors``: the newest ``keep`` committed models and the best one, each with
    ``round-000007.strategy.safetensors`` if the strategy has a state. ``rounds.jsonl``: a record for each round.
    ``model.safetensors`` and ``model.pt``: the job's model, once training is complete. ``model-best.safetensors`` and
    ``model-best.pt``: the best model by the objective's metric, if that was measured.
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
        """Create the directories and remove files that a crash left incomplete. Raise :class:`CheckpointError`."""
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
        """Write a checkpoint durably: write, fsync, rename, fsync the directory.

        The strategy's state is written before the model, whose appearance commits both.

        Raises:
            OSError: the checkpoint cannot be written.
            CheckpointError: it could not be read back; nothing is committed.
        """
        path, beside = self.path(round_number), self._strategy_path(round_number)
        if strategy:
            self._write(strategy, beside, self._strategy_spare, round_number)
        else:
            beside.unlink(missing_ok=True)  # left by a round that was never committed
        file = self._write(state, path, self._spare, round_number, notes)
        kept = snapshot(state) if file.size <= safetensors_file.SMALL_BYTES else safetensors_file.mapped(path)
        return Checkpoint(round_number, kept, file, strategy or {}, notes or {})

    def retire(self, wanted: Collection[int] = ()) -> None:
        """Remove old models, except the newest and those of the ``wanted`` rounds. Raise ``OSError``."""
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
        """Return the newest committed model, or ``None``. Raise :class:`CheckpointError`."""
        numbers = self.numbers()
        return self.load(numbers[-1]) if numbers else None

    def load(self, number: int) -> Checkpoint:
        """Return a committed model. Raise :class:`CheckpointError` if it is unreadable or belongs to another job."""
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
        """Write a model in PyTorch's format and as safetensors; return path and SHA-256 of the latter.

        In the ``.pt`` file names share memory as in the script's model, which safetensors cannot express.
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
        """Write the model of round ``number`` as the best one; return path and SHA-256 of the safetensors file.

        If it is also the ``final`` one, which has been written, the files are linked. Without a number, only remove
        the best model of an earlier run, and return ``None``. Raises :class:`CheckpointError` and ``OSError``.
        """
        for suffix in _SUFFIXES:  # left by a run with other rounds
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
                except OSError:  # the volume has no hard links
                    shutil.copyfile(here, partial)
        return there, safetensors_file.sha256_of(there)

    def records(self, up_to: int | None = None) -> list[RoundRecord]:
        """Return the records of rounds 1 to ``up_to``. Later ones belong to rounds whose checkpoints were removed."""
        records: dict[int, RoundRecord] = {}
        if self._records.exists():
            for line in self._records.read_text(encoding="utf-8").splitlines():
                try:
                    record = RoundRecord.of_text(line)
                except ValueError:
                    continue  # an incomplete line, left by a crash
                if up_to is None or record.round <= up_to:
                    records[record.round] = record
        return [records[number] for number in sorted(records)]

    def append(self, record: RoundRecord) -> None:
        """Append a record; it replaces an earlier one of the same round when read. Raise ``OSError``."""
        line = record.text().encode() + b"\n"
        with self._records.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the last line is incomplete after a crash or on a full disk
                    line = b"\n" + line
            file.write(line)

    def numbers(self) -> list[int]:
        """Return the rounds whose models are present, in ascending order."""
        found = (_PATTERN.fullmatch(path.name) for path in self._checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, number: int) -> Path:
        """Return the path of a round's model, which need not exist."""
        return self._checkpoints / f"round-{number:06d}.safetensors"

    def _strategy_path(self, number: int) -> Path:
        return self._checkpoints / f"round-{number:06d}.strategy.safetensors"


def _read(path: Path, model: Path) -> tuple[TensorFile, State, dict[str, str]]:
    """Read a file of the checkpoint ``model``, with its tensors and metadata. Raise :class:`CheckpointError`."""
    try:
        return safetensors_file.read(path)
    except (SafetensorError, OSError, ValueError) as error:
        it = "it" if path == model else model
        raise CheckpointError(
            f"{path} cannot be read ({error}); remove {it} to continue from the previous one"
        ) from None


@contextmanager
def _publishing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it durably to ``path``, or remove it after an error."""
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
