"""The operator's memory of a job, kept in an annotation of the FederatedJob.

It holds only what cannot be seen in the cluster or at the site: numbers of attempts, which must rise even when a pod
vanished without a trace, and how often a client failed by its own doing. It is written before what it announces is
done, so that a crash in between skips a number and never uses one twice. It lies on the FederatedJob because
everything else may be gone by the time the pools are cancelled (a namespace being deleted, a foreground deletion). It
bears the job's uid: one that was copied with a manifest, or came from a backup, tells nothing of this job.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from isthmus_contracts.api.federated_job_status import Reason

from . import index_ranges

# Users can write the annotation: what no operator has ever counted up to counts as damage.
_MOST = 1_000_000_000
_MOST_CLIENTS = 200_000  # of all pools
_MESSAGE = 80  # characters of an HPC pool's message, where the record is too long
ROOM = 192 * 1024  # bytes of an annotation: Kubernetes holds 256 KiB of all of an object's
LAST_SECOND = 100_000_000_000  # since the epoch: calendars go on for a while after it


@dataclass
class ClientRecord:
    """One cloud client that was started more than once, or failed."""

    attempt: int = 0  # the highest that was ever started
    failures: int = 0  # by its own doing
    counted: int = -1  # the attempt whose failure was counted last


@dataclass
class CloudRecord:
    """A cloud pool."""

    started: int = 0  # clients below this index have been started at least once
    clients: dict[int, ClientRecord] = field(default_factory=dict)
    size: int | None = None  # how far it has grown or shrunk; None: as the manifest says
    floor: int = 0  # the highest attempt of clients whose entries were dropped: see Record.bounded

    def client(self, index: int) -> ClientRecord:
        """The client's entry, for reading."""
        known = self.clients.get(index)
        if known is None:
            # Of one whose entry was dropped it is not known which attempts failed.
            return ClientRecord(self.floor, 0, self.floor if self.floor else -1)
        return known


@dataclass
class HpcRecord:
    """An HPC pool, or a part of it: its newest attempt. See parts.py."""

    site: str
    attempt: int = 0
    failures: int = 0
    seen: bool = False  # the site has answered for this attempt
    ran: bool = False  # at least one task of this attempt has left the queue
    cancelling: bool = False  # we asked for its end: it counts as no failure
    ended: bool = False  # nothing of it is left at the site
    over: str = ""  # the reason why it is not started again
    message: str = ""  # the words for it, or for the end of the attempt before this one
    retry_at: int = 0  # seconds since the epoch
    asked_at: int = 0  # likewise: when this attempt was asked for
    authority: str = ""  # which CA signed its certificate
    certificate: str = ""  # which one the site has
    first: int = 0  # the pool's index of its first client
    size: int = 0  # its clients
    leaving: bool = False  # it is not started again
    newest: int = 0  # the highest attempt of any part, gone ones included

    @property
    def end(self) -> int:
        """The pool's index behind its last client."""
        return self.first + self.size


@dataclass
class AggregatorRecord:
    """Crashes of the aggregator since the last round that it completed."""

    pod: str = ""  # uid
    restarts: int = 0  # of that pod, as far as they are counted; its end with exit code 0 is one, too
    crashes: int = 0
    round: int = 0


@dataclass
class Record:
    """Everything that is remembered of a job."""

    cloud: dict[str, CloudRecord] = field(default_factory=dict)
    hpc: dict[str, HpcRecord] = field(default_factory=dict)
    aggregator: AggregatorRecord = field(default_factory=AggregatorRecord)

    def bounded(self, uid: str, room: int) -> str:
        """Return :meth:`dump`'s text in at most ``room`` bytes, and forget what does not fit.

        Kubernetes holds 256 KiB of annotations. First messages of HPC pools are cut, then dropped. Then the entries of
        cloud clients go, those with the fewest failures first: such a client's failures are forgiven, and its next
        attempt gets a number above all those that were dropped, so that no number is used twice.
        """
        for longest in (_MESSAGE, 0):
            if len(text := self.dump(uid)) <= room:
                return text
            for part in self.hpc.values():
                part.message = part.message[:longest]
        text = self.dump(uid)
        order = sorted(
            (entry.failures, name, -index) for name, pool in self.cloud.items() for index, entry in pool.clients.items()
        )
        while order and len(text) > room:
            # As many as the excess is worth, and some: writing thousands of entries takes a while.
            count = max(1, int(len(order) * ((len(text) - room) / len(text) + 0.02)))
            for _, name, index in order[:count]:
                pool = self.cloud[name]
                pool.floor = max(pool.floor, pool.clients.pop(-index).attempt)
            order = order[count:]
            text = self.dump(uid)
        return text

    def dump(self, uid: str = "") -> str:
        """As compact JSON; equal records give equal text. ``uid``: the job's."""
        cloud = {
            name: {"started": pool.started, "clients": _grouped(pool.clients),
                   **({} if pool.size is None else {"size": pool.size}),
                   **({"floor": pool.floor} if pool.floor else {})}
            for name, pool in sorted(self.cloud.items())
        }  # fmt: skip
        hpc = {name: _without_defaults(pool) for name, pool in sorted(self.hpc.items())}
        content = {"uid": uid, "cloud": cloud, "hpc": hpc, "aggregator": _without_defaults(self.aggregator)}
        return json.dumps({key: value for key, value in content.items() if value}, separators=(",", ":"))

    @classmethod
    def load(cls, text: str, uid: str = "") -> Self:
        """Reads :meth:`dump`'s text; that of another job than ``uid`` is empty. Raises ``ValueError`` for any other."""
        if not text:
            return cls()
        try:
            content = json.loads(text)
            # Records were written without a uid once.
            if uid and content.get("uid", uid) != uid:
                return cls()
            cloud: dict[str, CloudRecord] = {}
            room = _MOST_CLIENTS
            for name, pool in content.get("cloud", {}).items():
                cloud[name] = _cloud(pool, room)
                room -= len(cloud[name].clients)
            hpc = {name: HpcRecord(**pool) for name, pool in content.get("hpc", {}).items()}
            aggregator = AggregatorRecord(**content.get("aggregator", {}))
            for part in hpc.values():
                _check(part)
            _check(aggregator)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"the record does not parse: {error}") from error
        return cls(cloud, hpc, aggregator)


def _grouped(clients: Mapping[int, ClientRecord]) -> dict[str, list[int]]:
    """What is remembered, by the indices of the clients of which the same is: an annotation holds only so much."""
    alike: dict[tuple[int, int, int], list[int]] = {}
    for index, entry in sorted(clients.items()):
        alike.setdefault((entry.attempt, entry.failures, entry.counted), []).append(index)
    return {index_ranges.write(indices): list(entry) for entry, indices in alike.items()}


def _cloud(pool: Mapping[str, Any], most: int) -> CloudRecord:
    clients: dict[int, ClientRecord] = {}
    for indices, (attempt, failures, counted) in pool["clients"].items():
        _in_range(attempt, failures)
        _in_range(counted, least=-1)
        for index in index_ranges.read(indices):
            if index in clients or len(clients) >= most:
                raise ValueError(f"client {index} is told of twice, or is one too many")
            clients[index] = ClientRecord(attempt, failures, counted)
    size = pool.get("size")
    floor = pool.get("floor", 0)
    _in_range(pool["started"], 0 if size is None else size, floor)
    return CloudRecord(pool["started"], clients, size, floor)


def _without_defaults(entry: HpcRecord | AggregatorRecord) -> dict[str, Any]:
    defaults = {item.name: item.default for item in fields(entry)}
    return {name: value for name, value in asdict(entry).items() if value != defaults[name]}


def _check(entry: HpcRecord | AggregatorRecord) -> None:
    for item in fields(entry):
        value = getattr(entry, item.name)
        if type(value) is not item.type:
            raise ValueError(f"{item.name} is {value!r}")
        if item.type is int:
            _in_range(value, most=LAST_SECOND if item.name in ("retry_at", "asked_at") else _MOST)
    if isinstance(entry, HpcRecord) and entry.over:
        Reason(entry.over)


def _in_range(*numbers: object, least: int = 0, most: int = _MOST) -> None:
    for number in numbers:
        if type(number) is not int or not least <= number <= most:
            raise ValueError(f"{number!r} is no number from {least} to {most}")
