"""What the aggregator knows of each client from earlier rounds; it is committed with each round's model."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from .membership import ClientId

# How much the newest observation counts in a moving average.
_NEWEST = 0.3


@dataclass(frozen=True)
class ClientRecord:
    """One client's past."""

    examples: int = 0
    """Of its newest update."""
    loss: float | None = None
    """The training loss that came with it."""
    seconds: float | None = None
    """From offer to update, as a moving average."""
    reliability: float = 1.0
    """Share of its rounds that it handed in for, as a moving average."""
    asked: int = 0
    """The newest round that it was asked to take part in; 0: none."""
    counted: tuple[int, ...] = ()
    """The rounds, not too long ago for an update to come late, for which it trained an update that is counted."""
    offered: tuple[int, ...] = ()
    """The rounds, as many, that it was asked to take part in."""

    @property
    def known(self) -> bool:
        """True if it has ever handed in."""
        return self.seconds is not None


@dataclass(frozen=True)
class Report:
    """One accepted update, as far as it tells of its client."""

    round: int
    """That it was trained for."""
    examples: int
    loss: float | None
    seconds: float


@dataclass
class ClientHistory:
    """The records of all clients that were ever asked."""

    records: dict[ClientId, ClientRecord] = field(default_factory=dict)

    def of(self, client: ClientId) -> ClientRecord:
        """A client's record; an empty one for a client that is not known."""
        return self.records.get(client, ClientRecord())

    def after_round(
        self, round_number: int, asked: Iterable[ClientId], missed: Mapping[ClientId, float | None],
        reports: Iterable[tuple[ClientId, Report]], horizon: int,
    ) -> "ClientHistory":  # fmt: skip
        """The history after a round.

        ``missed``: who was asked and did not hand in, and for how many seconds it has been at work without having
        failed, if it has not: such a client is slow, not unreliable. ``horizon``: how late updates may be.
        """
        history = ClientHistory(dict(self.records))
        for client in asked:
            record = history.of(client)
            offered = tuple(number for number in record.offered if number >= round_number - horizon)
            history.records[client] = replace(record, asked=round_number, offered=(*offered, round_number))
        for client, seconds in missed.items():
            record = history.of(client)
            if seconds is None:
                history.records[client] = replace(record, reliability=_moved(record.reliability, 0.0))
            elif record.seconds is not None:
                history.records[client] = replace(record, seconds=max(record.seconds, seconds))
        for client, report in reports:
            record = history.of(client)
            history.records[client] = replace(
                record,
                examples=report.examples,
                loss=report.loss,
                seconds=report.seconds if record.seconds is None else _moved(record.seconds, report.seconds),
                reliability=_moved(record.reliability, 1.0),
                counted=tuple(number for number in (*record.counted, report.round) if number >= round_number - horizon),
            )
        return history

    def text(self) -> str:
        """The history, to be written beside a model."""
        return json.dumps([[*client, *astuple(record)] for client, record in sorted(self.records.items())])

    @classmethod
    def of_text(cls, text: str) -> "ClientHistory":
        """Return what :meth:`text` wrote. Raises ``ValueError`` for anything else."""
        try:
            return cls({(pool, index): _record(*values) for pool, index, *values in json.loads(text)})
        except TypeError as error:
            raise ValueError(f"not a history of clients: {error}") from None


def _record(*values: Any) -> ClientRecord:
    record = ClientRecord(*values)
    return replace(record, counted=tuple(record.counted), offered=tuple(record.offered))


def _moved(average: float, newest: float) -> float:
    return round(average + _NEWEST * (newest - average), 6)
