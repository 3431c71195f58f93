"""Results of committed rounds, from the aggregator's status and from its rounds.jsonl."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from isthmus_contracts.api.federated_job import Objective
from isthmus_contracts.pb import federation_pb2 as pb


@dataclass
class CommittedRound:
    """Result of a committed round."""

    number: int
    seconds: float
    updates: int
    metrics: dict[str, float] = field(default_factory=dict)
    late: int = 0
    failed: int = 0


class RoundRecords:
    """Rounds in order, each returned once, when its result is complete.

    The aggregator's status is updated within a tenth of a second, but may skip a fast round. rounds.jsonl holds every
    round, but the metrics of its model only once the next round ends. So both are read.
    """

    def __init__(self, records: Path, objective: Objective, reported: int) -> None:
        """``reported``: number of rounds that an earlier run has reported."""
        self._records = records
        self._position = 0
        self._objective = objective
        self._reported = reported
        self._rounds: dict[int, CommittedRound] = {}
        self._measured: dict[int, dict[str, float]] = {}

    def follow(self, status: pb.FederationStatus) -> list[CommittedRound]:
        """Process a status; return the rounds that are now complete."""
        for metric in status.metrics:
            self._measured.setdefault(metric.round, {})[metric.name] = metric.value
        self._read()
        ready = []
        while (record := self._rounds.get(self._reported + 1)) and record.number <= status.completed_rounds:
            record.metrics |= self._measured.get(record.number, {})
            superseded = status.completed_rounds > record.number or status.phase == pb.FederationStatus.COMPLETE
            if not superseded and self._objective.metric not in record.metrics:
                break
            ready.append(record)
            self._reported += 1
        for by_round in (self._rounds, self._measured):
            for number in [number for number in by_round if number <= self._reported]:
                del by_round[number]
        return ready

    def _read(self) -> None:
        """Read the lines added to rounds.jsonl; an incomplete line is read the next time."""
        try:
            with self._records.open("rb") as file:
                file.seek(self._position)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._position += len(line)
                    self._add(line)
        except FileNotFoundError:
            return

    def _add(self, line: bytes) -> None:
        try:
            item = json.loads(line)
            missing = (item.get("late", 0), item.get("failed", 0))
            record = CommittedRound(item["round"], item["seconds"], item["updates"], item["metrics"], *missing)
        except (ValueError, TypeError, KeyError, AttributeError):
            return  # damaged by a crash
        self._rounds[record.number] = record
