"""The operator's memory of a job, kept in an annotation of the FederatedJob.

It holds only what cannot be seen in the cluster or at the site: numbers of attempts, which must rise even when a pod
vanished without a trace, and how often a client failed by its own doing. It is written before what it announces is
done, so that a crash in between skips a number and never uses one twice. It lies on the FederatedJob because
everything else may be gone by the time the pools are cancelled (a namespace being deleted, a foreground deletion). It
bears the job's uid: one that was copied with a manifest, or came from a backup, tells nothing of this job.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


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

    def client(self, index: int) -> ClientRecord:
        """The client's entry, for reading."""
        return self.clients.get(index) or ClientRecord()


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
    message: str = ""  # the words for it
    retry_at: int = 0  # seconds since the epoch
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
    restarts: int = 0  # of that pod, as far as they are counted
    crashes: int = 0
    round: int = 0


@dataclass
class Record:
    """Everything that is remembered of a job."""

    cloud: dict[str, CloudRecord] = field(default_factory=dict)
    hpc: dict[str, HpcRecord] = field(default_factory=dict)
    aggregator: AggregatorRecord = field(default_factory=AggregatorRecord)

    def dump(self, uid: str = "") -> str:
        """As compact JSON; equal records give equal text. ``uid``: the job's."""
        cloud = {
            name: {"started": pool.started, "clients": {str(i): [c.attempt, c.failures, c.counted] for i, c in
                                                        sorted(pool.clients.items())},
                   **({} if pool.size is None else {"size": pool.size})}
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
            cloud = {
                str(name): CloudRecord(
                    int(pool["started"]),
                    {int(i): ClientRecord(*(int(v) for v in entry)) for i, entry in pool["clients"].items()},
                    int(pool["size"]) if "size" in pool else None,
                )
                for name, pool in content.get("cloud", {}).items()
            }
            hpc = {str(name): HpcRecord(**pool) for name, pool in content.get("hpc", {}).items()}
            aggregator = AggregatorRecord(**content.get("aggregator", {}))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the record does not parse: {error}") from error
        for pool in hpc.values():
            _check(pool)
        _check(aggregator)
        return cls(cloud, hpc, aggregator)


def _without_defaults(entry: HpcRecord | AggregatorRecord) -> dict[str, Any]:
    defaults = {item.name: item.default for item in fields(entry)}
    return {name: value for name, value in asdict(entry).items() if value != defaults[name]}


def _check(entry: HpcRecord | AggregatorRecord) -> None:
    for item in fields(entry):
        value = getattr(entry, item.name)
        if type(value) is not item.type:
            raise ValueError(f"the record does not parse: {item.name} is {value!r}")
