"""Files of secure aggregation in the state directory: the counter of instances, the masked sum, and the journal."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from .accumulator import AccumulatorFile
from .incarnations import Incarnations
from .journal import Entry, JournalFile

T = TypeVar("T")

DIRECTORY = "secure"
"""Name of the directory, within the state directory."""
_COUNTER, _SUM, _JOURNAL = "incarnation", "accumulator", "journal"
_WHAT = "state of secure aggregation"


class Persistently(Protocol):
    """Function that calls another one in a thread until it raises no ``OSError``; ``what`` it writes is shown."""

    def __call__(self, what: str, write: Callable[[], T]) -> Awaitable[T]: ...


class DurableState:
    """Files of one job."""

    def __init__(self, directory: Path, persistently: Persistently) -> None:
        """``directory``: the aggregator's state directory."""
        self._directory = directory / DIRECTORY
        self._persistently = persistently
        self._journal = JournalFile(self._directory / _JOURNAL)
        self._incarnations: Incarnations | None = None
        self.accumulator = AccumulatorFile(self._directory / _SUM)

    async def open(self) -> Entry | None:
        """Create the directory; return what an earlier process wrote to the journal."""

        def opened() -> Entry | None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._incarnations = Incarnations(self._directory / _COUNTER)
            return self._journal.read()

        return await self._persistently(_WHAT, opened)

    async def keep(self, write: Callable[[], T]) -> T:
        """Call a function that writes to the disk in a thread, until it succeeds; return its result."""
        return await self._persistently(_WHAT, write)

    async def next_incarnation(self) -> int:
        """Return the number of a new instance, once it is durable that it was used."""
        assert self._incarnations is not None, "open() comes first"
        return await self._persistently(_WHAT, self._incarnations.next)

    async def write(self, entry: Entry) -> None:
        """Replace the journal's entry durably."""
        await self._persistently(_WHAT, lambda: self._journal.write(entry, sync=True))

    def note(self, entry: Entry) -> None:
        """Replace the journal's entry, if possible. The old or the new one survives the end of the process.

        Where it counts lost sums, it also survives a power failure, as the entry that it replaces would: clients must
        not be asked for another sum of the same updates.
        """
        with suppress(OSError):
            self._journal.write(entry, sync=entry.attempt > 0)

    async def discard(self) -> None:
        """Remove the journal's entry and the sum."""

        def discarded() -> None:
            self._journal.remove()
            self.accumulator.remove()

        await self._persistently(_WHAT, discarded)
