"""Training script for tests that uses Lightning. PLAIN: with a plain loop. ENDLESS: until it should stop.
ACCUMULATE: the number of batches per step."""

import os
from pathlib import Path

import lightning.pytorch as lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import isthmus
from isthmus.integrations.lightning import FederatedCallback

BATCH, RATE = 6, 0.05
ACCUMULATE = int(os.environ.get("ACCUMULATE", "2"))


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        Path(f"trains-{isthmus.context().client}").touch()
        inputs, targets = batch
        return (self.layer(inputs).squeeze(1) - targets).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def main() -> None:
    torch.set_num_threads(1)
    client = isthmus.context().client
    torch.manual_seed(client)
    data = TensorDataset(torch.randn(24, 4), torch.randn(24) + client)
    loader = DataLoader(data, batch_size=BATCH)
    model = Regression()
    for rnd in isthmus.rounds(model):
        if os.environ.get("PLAIN"):
            optimizer, losses = rnd.wrap(model.configure_optimizers()), []
            for number, batch in enumerate(loader, start=1):
                loss = model.training_step(batch, number)
                (loss / ACCUMULATE).backward()
                losses.append(loss.item())
                if number % ACCUMULATE == 0:
                    optimizer.step()
                    optimizer.zero_grad()
            rnd.submit(num_examples=len(data), loss=sum(losses) / len(losses))
            continue
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=-1 if os.environ.get("ENDLESS") else 1, accumulate_grad_batches=ACCUMULATE,
            callbacks=[FederatedCallback(rnd)], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, loader)


if __name__ == "__main__":
    main()
