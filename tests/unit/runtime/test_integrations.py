"""What the callbacks for other libraries' trainers count."""

from types import SimpleNamespace

import pytest
import torch

from isthmus.client.round import Round

handed_in: list[tuple[int, dict[str, float]]] = []


@pytest.fixture
def rnd() -> Round:
    handed_in.clear()
    return Round(1, {}, _hand_in=lambda number, metrics: handed_in.append((number, metrics)))


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
