"""What became of each round, put together from what the aggregator says and what it writes down."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from isthmus_contracts.api.federated_job import Objective
from isthmus_contracts.pb import federation_pb2 as pb


@dataclass
class Round:
    """A committed round."""

    number: int
    seconds: float
    updates: int
    metrics: dict[str, float] = field(default_factory=dict)
    late: int = 0
    failed: int = 0


class RoundBook:
    """Tells each round once, in order, when all that there is to tell of it has come.

    The aggregator's status follows a run within a tenth of a second and may pass over a fast round; rounds.jsonl holds
    every round, but the measurements of its model only once the next round ends. So both are read.
    """

    def __init__(self, records: Path, objective: Objective, told: int) -> None:
        """``told``: rounds of an earlier run, which told them."""
        self._records = records
        self._position = 0
        self._objective = objective
        self._told = told
        self._rounds: dict[int, Round] = {}
        self._measured: dict[int, dict[str, float]] = {}

    def follow(self, status: pb.FederationStatus) -> list[Round]:
        """Takes a status in; returns the rounds that can be told now."""
        for metric in status.metrics:
            self._measured.setdefault(metric.round, {})[metric.name] = metric.value
        self._read()
        ready = []
        while (record := self._rounds.get(self._told + 1)) and record.number <= status.completed_rounds:
            record.metrics |= self._measured.get(record.number, {})
            superseded = status.completed_rounds > record.number or status.phase == pb.FederationStatus.COMPLETE
            if not superseded and self._objective.metric not in record.metrics:
                break
            ready.append(record)
            self._told += 1
        for book in (self._rounds, self._measured):
            for number in [number for number in book if number <= self._told]:
                del book[number]
        return ready

    def _read(self) -> None:
        """Takes in what was added to rounds.jsonl; a line that is not finished yet waits for the next time."""
        try:
            with self._records.open("rb") as file:
                file.seek(self._position)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._position += len(line)
                    self._take(line)
        except FileNotFoundError:
            return

    def _take(self, line: bytes) -> None:
        try:
            item = json.loads(line)
            missing = (item.get("late", 0), item.get("failed", 0))
            record = Round(item["round"], item["seconds"], item["updates"], item["metrics"], *missing)
        except (ValueError, TypeError, KeyError, AttributeError):
            return  # torn by a crash
        self._rounds[record.number] = record
