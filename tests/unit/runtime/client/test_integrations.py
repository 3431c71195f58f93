"""Numbers of examples and losses that the callbacks for other libraries' trainers submit."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from isthmus.client.corrections.proximal import ProximalTerm
from isthmus.client.round import Round
from isthmus.client.state.parameter_names import ParameterNames

handed_in: list[tuple[int, dict[str, float]]] = []


@pytest.fixture
def rnd() -> Round:
    handed_in.clear()
    return Round(1, {}, _finish=lambda number, metrics: lambda: handed_in.append((number, metrics)))


@pytest.mark.parametrize(("epochs", "expected"), [(3.0, 100), (1.0, 100), (0.25, 25), (0.001, 1)])
def test_transformers_counts_the_part_of_the_data_that_was_used(rnd: Round, epochs: float, expected: int) -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install isthmus[transformers]")
    from isthmus.integrations.transformers import FederatedCallback

    callback = FederatedCallback(rnd)
    callback.on_log(None, None, None, logs={"train_loss": 0.5})
    loader = SimpleNamespace(dataset=range(100))
    callback.on_train_end(None, SimpleNamespace(epoch=epochs), None, train_dataloader=loader)
    assert handed_in == [(expected, {"loss": 0.5})]


def test_transformers_asks_for_what_it_cannot_know(rnd: Round) -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install isthmus[transformers]")
    from isthmus.integrations.transformers import FederatedCallback

    loader = SimpleNamespace(dataset=iter(()))
    with pytest.raises(ValueError, match="pass num_examples to FederatedCallback"):
        FederatedCallback(rnd).on_train_end(None, SimpleNamespace(epoch=1.0), None, train_dataloader=loader)
    FederatedCallback(rnd, 7).on_train_end(None, SimpleNamespace(epoch=1.0), None, train_dataloader=loader)
    assert handed_in == [(7, {})]


def test_lightning_counts_the_largest_epoch(rnd: Round) -> None:
    pytest.importorskip("lightning", reason="needs lightning: pip install isthmus[lightning]")
    from isthmus.integrations.lightning import FederatedCallback

    callback = FederatedCallback(rnd)
    trainer = SimpleNamespace(
        accumulate_grad_batches=2, strategy=SimpleNamespace(reduce=lambda tensor, reduce_op: tensor * 3)
    )
    module = SimpleNamespace(device=torch.device("cpu"))
    for batches in ((4, 4, 2), (4,)):
        callback.on_train_epoch_start(trainer, module)
        for number, size in enumerate(batches):
            outputs = {"loss": torch.tensor(0.5)}
            callback.on_train_batch_end(trainer, module, outputs, [torch.zeros(size, 2), torch.zeros(size)], number)
    callback.on_train_end(trainer, module)
    callback.on_fit_end(trainer, module)
    assert handed_in == [(30, {"loss": 1.0})]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_trains_with_the_correction_that_a_plain_loop_has(
    rnd: Round, accumulate: int, precision: Any
) -> None:
    """Lightning steps with closures that zero and compute gradients; this shows only without accumulation."""
    lightning = pytest.importorskip("lightning.pytorch", reason="needs lightning: pip install isthmus[lightning]")
    from isthmus.integrations.lightning import FederatedCallback

    class Regression(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
            return (self.layer(batch[0]).squeeze(1) - batch[1]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(24, 4, generator=generator), torch.randn(24, generator=generator) + 3)
    loader = DataLoader(data, batch_size=6)
    results = {}
    for mu, loop in ((5.0, "lightning"), (5.0, "plain"), (0.0, "uncorrected")):
        model = Regression()
        term = ProximalTerm(mu, ParameterNames.of(model, model.state_dict()))
        if loop == "lightning":
            trainer = lightning.Trainer(
                accelerator="cpu", precision=precision, max_epochs=5, accumulate_grad_batches=accumulate,
                callbacks=[FederatedCallback(Round(1, {}, term))], logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(model, loader)
        else:
            optimizer = Round(1, {}, term).wrap(model.configure_optimizers())
            for number, batch in enumerate(batch for _ in range(5) for batch in loader):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
                    loss = model.training_step(batch, number) / accumulate
                loss.backward()
                if number % accumulate == accumulate - 1:
                    optimizer.step()
                    optimizer.zero_grad()
        term.close()
        results[loop] = model.layer.bias.item()
    assert results["lightning"] == pytest.approx(results["plain"], rel=1e-4)
    assert abs(results["lightning"] - results["uncorrected"]) > 0.1
