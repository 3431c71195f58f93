"""The record of a job that the operator stores in an annotation of the FederatedJob.

It holds only what cannot be observed in the cluster or at a site: attempt numbers, which must rise even if a pod
vanished without a trace, and the number of failures that a client caused itself. It is written before the actions that
it announces, so that a crash in between skips a number but never uses one twice. It is stored on the FederatedJob
because all other objects may be gone by the time the pools are cancelled (namespace deletion, foreground deletion). It
contains the job's uid, so that a record that was copied with a manifest or restored from a backup is ignored.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from typing import Any, Self

from isthmus_contracts.api.federated_job_status import Reason

from . import index_ranges

# Users can write the annotation. Numbers that no operator can have reached are treated as damage.
_MOST = 1_000_000_000
_MOST_CLIENTS = 200_000  # of all pools
_MESSAGE = 80  # characters of an HPC pool's message in a record that is too long
ROOM = 192 * 1024  # bytes for the record: Kubernetes allows 256 KiB for all annotations of an object
LAST_SECOND = 100_000_000_000  # since the epoch; datetime can still represent it


@dataclass
class ClientRecord:
    """A cloud client that was started more than once or has failed."""

    attempt: int = 0  # the highest that was ever started
    failures: int = 0  # not counting disruptions by the cluster
    counted: int = -1  # the attempt whose failure was counted last


@dataclass
class CloudRecord:
    """A cloud pool."""

    started: int = 0  # clients below this index have been started at least once
    clients: dict[int, ClientRecord] = field(default_factory=dict)
    size: int | None = None  # current number of clients of a bursting pool; None: as in the manifest
    floor: int = 0  # the highest attempt of clients whose entries were dropped: see Record.bounded

    def client(self, index: int) -> ClientRecord:
        """Return the client's entry, or a default one that is not stored."""
        known = self.clients.get(index)
        if known is None:
            # If its entry was dropped, it is unknown which of its attempts failed.
            return ClientRecord(self.floor, 0, self.floor if self.floor else -1)
        return known


@dataclass(frozen=True, order=True)
class ArrayKey:
    """The name of one array of an HPC pool, unique in its job's record."""

    pool: str
    number: int = 0  # 0 for the pool's first array; else the first attempt that the array was made for

    def __str__(self) -> str:
        return f"{self.pool}/{self.number}" if self.number else self.pool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``str()``'s text. Raises ``ValueError``."""
        pool, separator, number = text.partition("/")
        if separator and not (number.isascii() and number.isdigit()):
            raise ValueError(f"{text!r} is not the name of an array")
        return cls(pool, int(number) if separator else 0)


class ArrayState(StrEnum):
    """The progress of an array's current attempt. The transitions are listed in :mod:`..planning.hpc_pool`."""

    WAITING = "Waiting"  # not requested yet
    REQUESTED = "Requested"  # requested from the site, which has not confirmed it yet
    ACCEPTED = "Accepted"  # confirmed by the site; no task has left the queue
    RAN = "Ran"  # at least one task has left the queue
    WITHDRAWING = "Withdrawing"  # cancelled before the site confirmed it
    CANCELLING = "Cancelling"  # cancelled; the site has not confirmed the end yet
    ENDED = "Ended"  # nothing of it is left at the site


@dataclass
class Submission:
    """The request for an array's current attempt."""

    requested_at: int = 0  # seconds since the epoch
    authority: str = ""  # fingerprint of the CA that signed its certificate
    certificate: str = ""  # digest of the certificate that the site has


@dataclass
class Setback:
    """The end of an array's previous attempt, or the reason why there will be no further one."""

    message: str = ""
    retry_at: int = 0  # seconds since the epoch
    given_up: Reason | None = None  # set: the array is not submitted again


@dataclass
class ArrayRecord:
    """One array of an HPC pool: a range of the pool's clients, and the newest attempt to run them."""

    site: str
    attempt: int = 0
    state: ArrayState = ArrayState.WAITING
    failures: int = 0
    first: int = 0  # index in the pool of its first client
    size: int = 0  # clients
    retiring: bool = False  # not submitted again once it ends
    submission: Submission = field(default_factory=Submission)
    setback: Setback = field(default_factory=Setback)

    @property
    def stop(self) -> int:
        """The index in the pool after its last client."""
        return self.first + self.size

    @property
    def ended(self) -> bool:
        """True if nothing of the attempt is left at the site."""
        return self.state is ArrayState.ENDED

    @property
    def at_site(self) -> bool:
        """True if the site may have the attempt."""
        return self.state not in (ArrayState.WAITING, ArrayState.ENDED)

    @property
    def confirmed(self) -> bool:
        """True if the site has reported the attempt, and has not reported its end."""
        return self.state in (ArrayState.ACCEPTED, ArrayState.RAN, ArrayState.CANCELLING)

    @property
    def cancelling(self) -> bool:
        """True while the operator cancels the attempt. Its end then counts as no failure."""
        return self.state in (ArrayState.WITHDRAWING, ArrayState.CANCELLING)

    @property
    def given_up(self) -> Reason | None:
        """The reason why the array is not submitted again, if it is not."""
        return self.setback.given_up


@dataclass
class AggregatorRecord:
    """Crashes of the aggregator since the last round that it completed."""

    pod: str = ""  # uid
    restarts: int = 0  # counted restarts of that pod; an exit with code 0 counts as well
    crashes: int = 0
    round: int = 0


@dataclass
class Record:
    """Everything that is stored of a job."""

    cloud: dict[str, CloudRecord] = field(default_factory=dict)
    hpc: dict[ArrayKey, ArrayRecord] = field(default_factory=dict)
    aggregator: AggregatorRecord = field(default_factory=AggregatorRecord)
    attempts: dict[str, int] = field(default_factory=dict)  # by HPC pool: the highest attempt of a forgotten array
    damaged: bool = field(default=False, compare=False)  # recovered from the status

    def copy(self) -> Self:
        """Return a copy that shares nothing mutable with this record."""
        cloud = {
            name: replace(pool, clients={index: replace(client) for index, client in pool.clients.items()})
            for name, pool in self.cloud.items()
        }
        hpc = {
            key: replace(array, submission=replace(array.submission), setback=replace(array.setback))
            for key, array in self.hpc.items()
        }
        return type(self)(cloud, hpc, replace(self.aggregator), dict(self.attempts), self.damaged)

    def bounded(self, uid: str, room: int) -> str:
        """Return :meth:`dump`'s text in at most ``room`` bytes, and drop what does not fit.

        Messages of HPC arrays are cut first, then dropped. Then entries of cloud clients are dropped, those with the
        fewest failures first. The failures of these clients are forgiven, and their next attempts get a number above
        all dropped ones, so that no number is used twice.
        """
        for longest in (_MESSAGE, 0):
            if len(text := self.dump(uid)) <= room:
                return text
            for array in self.hpc.values():
                array.setback.message = array.setback.message[:longest]
        text = self.dump(uid)
        order = sorted(
            (entry.failures, name, -index) for name, pool in self.cloud.items() for index, entry in pool.clients.items()
        )
        while order and len(text) > room:
            # In proportion to the excess and a little more, since each dump of thousands of entries takes a while.
            count = max(1, int(len(order) * ((len(text) - room) / len(text) + 0.02)))
            for _, name, index in order[:count]:
                pool = self.cloud[name]
                pool.floor = max(pool.floor, pool.clients.pop(-index).attempt)
            order = order[count:]
            text = self.dump(uid)
        return text

    def dump(self, uid: str = "") -> str:
        """Return compact JSON; equal records give equal text. ``uid``: the job's."""
        cloud = {
            name: {"started": pool.started, "clients": _grouped(pool.clients),
                   **({} if pool.size is None else {"size": pool.size}),
                   **({"floor": pool.floor} if pool.floor else {})}
            for name, pool in sorted(self.cloud.items())
        }  # fmt: skip
        hpc = {str(key): _without_defaults(array) for key, array in sorted(self.hpc.items())}
        content = {
            "uid": uid,
            "cloud": cloud,
            "hpc": hpc,
            "aggregator": _without_defaults(self.aggregator),
            "attempts": self.attempts,
        }
        return json.dumps({key: value for key, value in content.items() if value}, separators=(",", ":"))

    @classmethod
    def load(cls, text: str, uid: str = "") -> Self:
        """Parse :meth:`dump`'s text; return an empty record if it belongs to another job than ``uid``.

        Raises ``ValueError`` if the text does not parse.
        """
        if not text:
            return cls()
        try:
            content = json.loads(text)
            if uid and content.get("uid") != uid:
                return cls()
            cloud: dict[str, CloudRecord] = {}
            room = _MOST_CLIENTS
            for name, pool in content.get("cloud", {}).items():
                cloud[name] = _cloud(pool, room)
                room -= len(cloud[name].clients)
            hpc = {ArrayKey.parse(name): _array(array) for name, array in content.get("hpc", {}).items()}
            aggregator = AggregatorRecord(**content.get("aggregator", {}))
            _check(aggregator)
            attempts = dict(content.get("attempts", {}))
            _in_range(*attempts.values())
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"the record does not parse: {error}") from error
        return cls(cloud, hpc, aggregator, attempts)


def _grouped(clients: Mapping[int, ClientRecord]) -> dict[str, list[int]]:
    """Group clients with equal entries under their index ranges, since annotations are limited in size."""
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
                raise ValueError(f"client {index} is recorded twice, or is one too many")
            clients[index] = ClientRecord(attempt, failures, counted)
    size = pool.get("size")
    floor = pool.get("floor", 0)
    _in_range(pool["started"], 0 if size is None else size, floor)
    return CloudRecord(pool["started"], clients, size, floor)


def _array(content: Mapping[str, Any]) -> ArrayRecord:
    setback = dict(content.get("setback", {}))
    if "given_up" in setback:
        setback["given_up"] = Reason(setback["given_up"])
    array = ArrayRecord(
        **{
            **content,
            "state": ArrayState(content.get("state", ArrayState.WAITING)),
            "submission": Submission(**content.get("submission", {})),
            "setback": Setback(**setback),
        }
    )
    for entry in (array, array.submission, array.setback):
        _check(entry)
    return array


def _without_defaults(entry: object) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for item in fields(entry):  # type: ignore[arg-type]
        value = getattr(entry, item.name)
        if is_dataclass(value):
            value = _without_defaults(value)
            if value:
                content[item.name] = value
        elif value != item.default:
            content[item.name] = value
    return content


def _check(entry: object) -> None:
    """Check the types and ranges of the plain fields; raises ``ValueError``."""
    for item in fields(entry):  # type: ignore[arg-type]
        value = getattr(entry, item.name)
        if item.type in (str, int, bool) and type(value) is not item.type:
            raise ValueError(f"{item.name} is {value!r}")
        if item.type is int:
            _in_range(value, most=LAST_SECOND if item.name in ("retry_at", "requested_at") else _MOST)


def _in_range(*numbers: object, least: int = 0, most: int = _MOST) -> None:
    for number in numbers:
        if type(number) is not int or not least <= number <= most:
            raise ValueError(f"{number!r} is not a number from {least} to {most}")
