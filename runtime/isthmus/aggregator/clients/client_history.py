"""History of each client over earlier rounds, committed with each round's model."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from .membership import ClientId

# Weight of the newest observation in a moving average.
_NEWEST = 0.3


@dataclass(frozen=True)
class ClientRecord:
    """History of one client."""

    examples: int = 0
    """Number of examples in its newest update."""
    loss: float | None = None
    """Training loss reported with that update."""
    seconds: float | None = None
    """Seconds from offer to update, as a moving average."""
    reliability: float = 1.0
    """Share of its rounds in which it submitted an update, as a moving average."""
    asked: int = 0
    """Newest round for which it was selected; 0: none."""
    counted: tuple[int, ...] = ()
    """Rounds, recent enough for late updates, for which it trained an update that counts."""
    offered: tuple[int, ...] = ()
    """Rounds of the same period for which it was selected."""

    @property
    def known(self) -> bool:
        """True if it has ever submitted an update."""
        return self.seconds is not None


@dataclass(frozen=True)
class Report:
    """Per-client data of one accepted update."""

    round: int
    """Round for which it was trained."""
    examples: int
    loss: float | None
    seconds: float


@dataclass
class ClientHistory:
    """Records of all clients that were ever selected."""

    records: dict[ClientId, ClientRecord] = field(default_factory=dict)

    def of(self, client: ClientId) -> ClientRecord:
        """Return a client's record; an empty one for an unknown client."""
        return self.records.get(client, ClientRecord())

    def after_round(
        self, round_number: int, asked: Iterable[ClientId], missed: Mapping[ClientId, float | None],
        reports: Iterable[tuple[ClientId, Report]], horizon: int,
    ) -> "ClientHistory":  # fmt: skip
        """Return the history including one more round.

        ``missed``: clients that were asked and did not submit. The value is the time since the offer, in seconds, of a
        client that is still training, which is slow and not unreliable; ``None`` for one that failed. ``horizon``: the
        number of rounds by which an update may be late.
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
        """Return the history as text, for a checkpoint's notes."""
        return json.dumps([[*client, *astuple(record)] for client, record in sorted(self.records.items())])

    @classmethod
    def of_text(cls, text: str) -> "ClientHistory":
        """Parse the output of :meth:`text`. Raise ``ValueError`` for anything else."""
        try:
            return cls({(pool, index): _record(*values) for pool, index, *values in json.loads(text)})
        except TypeError as error:
            raise ValueError(f"not a history of clients: {error}") from None


def _record(*values: Any) -> ClientRecord:
    record = ClientRecord(*values)
    return replace(record, counted=tuple(record.counted), offered=tuple(record.offered))


def _moved(average: float, newest: float) -> float:
    return round(average + _NEWEST * (newest - average), 6)
