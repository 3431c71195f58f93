"""Callback for scripts that train with Hugging Face's Trainer (``pip install isthmus[transformers]``).

for rnd in isthmus.rounds(model):
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[FederatedCallback(rnd)])
    trainer.train()
"""

import math
from typing import Any

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        f"isthmus.integrations.transformers needs Transformers: pip install isthmus[transformers] ({error})"
    ) from None

from ..client.round import Round


class FederatedCallback(TrainerCallback):  # type: ignore[misc]
    """Callback for one round with one call of ``trainer.train()``.

    It wraps the optimizer, stops training if the round should stop, and submits after training, with the mean loss and
    ``num_examples``, by default the size of the data set, or of the part used if training ended within the first epoch.
    Raises ``ValueError`` if ``num_examples`` is not given and the data set has no length.
    """

    def __init__(self, rnd: Round, num_examples: int | None = None) -> None:
        self._round = rnd
        self._given = num_examples
        self._metrics: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if optimizer is not None:
            self._round.wrap(optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._round.should_stop:
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "train_loss" in logs:  # the mean over the whole training, logged at its end
            self._metrics = {"loss": float(logs["train_loss"])}

    def on_train_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        self._round.submit(num_examples=self._examples(state.epoch, train_dataloader), **self._metrics)

    def _examples(self, epochs: float, loader: Any) -> int:
        if self._given is not None:
            return self._given
        try:
            size = len(loader.dataset)
        except (AttributeError, TypeError):
            raise ValueError("the data set has no length: pass num_examples to FederatedCallback") from None
        return math.ceil(size * min(epochs, 1.0) - 1e-6)
