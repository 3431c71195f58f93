"""Training script for tests that uses Hugging Face's Trainer. PLAIN, ENDLESS: as in with_lightning."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import isthmus
from isthmus.integrations.transformers import FederatedCallback

BATCH, ACCUMULATE, RATE = 6, 2, 0.05


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.words, self.labels = torch.randint(1, 20, (24, 5)), torch.randint(0, 2, (24,))

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


class Trains(TrainerCallback):
    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        Path(f"trains-{isthmus.context().client}").touch()


class InOrder(Trainer):
    def _get_train_sampler(self, *args: object) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """Return the loss over all accumulated batches, which the Trainer does not divide again."""
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(isthmus.context().client)
    data = Data()
    model = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                   max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )  # fmt: skip
    arguments = TrainingArguments(
        "out", use_cpu=True, num_train_epochs=10_000 if os.environ.get("ENDLESS") else 1, learning_rate=RATE,
        per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATE, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    for rnd in isthmus.rounds(model):
        if os.environ.get("PLAIN"):
            model.train()
            optimizer, losses = rnd.wrap(torch.optim.SGD(model.parameters(), lr=RATE)), []
            for number, batch in enumerate(torch.utils.data.DataLoader(data, batch_size=BATCH), start=1):
                loss = model(**batch).loss
                (loss / ACCUMULATE).backward()
                losses.append(loss.item())
                if number % ACCUMULATE == 0:
                    optimizer.step()
                    optimizer.zero_grad()
            rnd.submit(num_examples=len(data), loss=sum(losses) / len(losses))
            continue
        callbacks = [FederatedCallback(rnd), Trains()]
        InOrder(model, arguments, train_dataset=data, compute_loss_func=mean_loss, callbacks=callbacks).train()


if __name__ == "__main__":
    main()
