"""Callback for scripts that train with Lightning (``pip install isthmus[lightning]``).

for rnd in isthmus.rounds(model):
    trainer = lightning.Trainer(max_epochs=1, callbacks=[FederatedCallback(rnd)])
    trainer.fit(model, loader)
"""

import signal
import threading
from typing import Any

import torch

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities.data import extract_batch_size
except ImportError as error:
    raise ImportError(
        f"isthmus.integrations.lightning needs Lightning: pip install isthmus[lightning] ({error})"
    ) from None

from ..client.round import Round


class FederatedCallback(Callback):  # type: ignore[misc]
    """Callback for one round with one call of ``trainer.fit``.

    It wraps the optimizers, stops training if the round should stop, and submits after fitting, with the mean loss and
    ``num_examples``, by default the largest number that all ranks together have seen in an epoch.
    Raises ``ValueError`` if ``num_examples`` is not given and Lightning cannot determine a batch's size.
    """

    def __init__(self, rnd: Round, num_examples: int | None = None) -> None:
        self._round = rnd
        self._given = num_examples
        self._on_sigterm = signal.getsignal(signal.SIGTERM)
        self._seen = 0.0  # in this epoch, by this rank
        self._most = 0.0
        self._loss, self._batches = 0.0, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # Lightning's own handler, set when fit() began, would end the process without an update. fit() restores ours
        # when it ends.
        if self._on_sigterm is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)
        for optimizer in trainer.optimizers:
            self._round.wrap(optimizer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._seen = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._given is None:
            try:
                self._seen += extract_batch_size(batch)
            except Exception as error:
                raise ValueError(f"pass num_examples to FederatedCallback: {error}") from None
            self._most = max(self._most, self._seen)
        if isinstance(outputs, dict) and isinstance(loss := outputs.get("loss"), torch.Tensor):
            # Lightning has divided the loss by the number of accumulated batches.
            self._loss += loss.item() * trainer.accumulate_grad_batches
            self._batches += 1
        if self._round.should_stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._given is None:
            seen = torch.tensor(int(self._most), device=pl_module.device)
            self._most = float(trainer.strategy.reduce(seen, reduce_op="sum"))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        # Not in on_train_end, where other callbacks may still change the weights.
        metrics = {"loss": self._loss / self._batches} if self._batches else {}
        self._round.submit(num_examples=int(self._most) if self._given is None else self._given, **metrics)
