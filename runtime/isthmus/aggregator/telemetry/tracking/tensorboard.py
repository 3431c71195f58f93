"""Sink for TensorBoard event files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .sink import Sink


class TensorBoardSink(Sink):
    """Sink for one directory. A restarted aggregator adds a file."""

    name = "TensorBoard"
    requirement = "isthmus[tensorboard]"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    def open(self) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(logdir=str(self._directory))

    def write(self, round_number: int, time: float, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, round_number, walltime=time)
        self._writer.flush()

    def finish(self, succeeded: bool, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            self._writer.add_text(name, value)
        self._writer.close()
