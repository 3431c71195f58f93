"""Distribution of each round's numbers to the tracking sinks of a job."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

from ...job import Job
from ...storage.round_record import RoundRecord
from .mlflow import MLflowSink
from .sink import Sink, Worker
from .tensorboard import TensorBoardSink

TENSORBOARD_DIRECTORY = "tensorboard"
# Characters that MLflow does not allow in a name.
_UNFIT = re.compile(r"[^\w.\- /]")


class Tracker:
    """Distributor of each round's numbers to all sinks, once. Never waits, never raises."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._workers = [Worker(sink) for sink in sinks]
        self._round = 0
        self._sent: set[str] = set()  # names of the newest round

    @property
    def notes(self) -> list[str]:
        """Current problems of the sinks, in one line each."""
        return [worker.note for worker in self._workers if worker.note]

    def take(self, record: RoundRecord) -> None:
        """Send a round's record; of a record that was sent before, only the new values."""
        if record.round != self._round:
            self._round, self._sent = record.round, set()
        values = {name: value for name, value in numbers_of(record).items() if name not in self._sent}
        self._sent |= set(values)
        if values:
            number, moment = record.round, record.time
            for worker in self._workers:
                worker.put(lambda sink: sink.write(number, moment, values))

    def finish(self, model: Path, sha256: str) -> None:
        """Mark the run as finished."""
        tags = {"model.sha256": sha256, "model.uri": model.absolute().as_uri()}
        for worker in self._workers:
            worker.put(lambda sink: sink.finish(True, tags))

    def fail(self, message: str) -> None:
        """Mark the run as failed."""
        for worker in self._workers:
            worker.put(lambda sink: sink.finish(False, {"failure": message}))

    def close(self, seconds: float) -> None:
        """Wait until everything is written, for at most this time."""
        until = time.monotonic() + seconds
        for worker in self._workers:
            worker.close(max(until - time.monotonic(), 0.1))


def numbers_of(record: RoundRecord) -> dict[str, float]:
    """Return the metrics by their own names, and the costs of the round under ``round/``."""
    costs = {"seconds": record.seconds, "updates": float(record.updates), "examples": float(record.examples)}
    costs |= {"late": float(record.late), "failed": float(record.failed)}
    costs |= {"received_bytes": float(record.received_bytes), "sent_bytes": float(record.sent_bytes)}
    costs |= {f"{stage}_seconds": seconds["mean"] for stage, seconds in record.stages.items()}
    costs |= {
        name: record.privacy[name] for name in ("epsilon", "clipped_ratio", "clip_norm") if name in record.privacy
    }
    metrics = {_UNFIT.sub("_", name): value for name, value in record.metrics.items()}
    return metrics | {f"round/{name}": value for name, value in costs.items()}


def make_tracker(job: Job, directory: Path) -> Tracker:
    """Return a tracker with the sinks of a job's manifest. ``directory``: the state directory."""
    tracking, sinks = job.spec.tracking, list[Sink]()
    if tracking.tensor_board is not None:
        sinks.append(TensorBoardSink(directory / TENSORBOARD_DIRECTORY))
    if tracking.mlflow is not None:
        server = tracking.mlflow
        sinks.append(MLflowSink(server.tracking_uri, server.experiment, job.name, job.uid, parameters_of(job)))
    return Tracker(sinks)


def parameters_of(job: Job) -> dict[str, str]:
    """Return the settings that distinguish a job from others that train the same model."""
    spec = job.spec
    parameters = {
        "namespace": job.namespace,
        "rounds": str(spec.rounds),
        "clients": str(spec.total_clients),
        "strategy": spec.strategy.algorithm,
        "selection": spec.selection.policy,
        "upload": spec.compression.upload,
        "download": spec.compression.download,
    }
    if (private := spec.privacy.differential_privacy) is not None:
        settings = private.model_dump(by_alias=True, exclude_none=True)
        clipping = settings.pop("adaptiveClipping", {})
        settings |= {f"adaptiveClipping.{name}": value for name, value in clipping.items()}
        parameters |= {f"privacy.{name}": value for name, value in settings.items()}
    parameters |= {f"strategy.{name}": str(value) for name, value in spec.strategy.values.items()}
    return parameters | {f"config.{_UNFIT.sub('_', name)}": value for name, value in spec.task.config.items()}
