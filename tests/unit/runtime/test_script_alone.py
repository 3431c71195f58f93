"""A training script outside a federation runs on its own."""

import pytest
import torch

import isthmus


def test_one_round_and_a_printed_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(1, 1)
    seen = []
    for rnd in isthmus.rounds(model, evaluate=lambda: {"accuracy": 0.5}):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert rnd.wrap(optimizer) is optimizer
        assert not rnd.should_stop
        rnd.submit(num_examples=3, loss=0.1)
        seen.append((rnd.number, rnd.config))
    assert seen == [(1, {})]
    assert capsys.readouterr().out == "accuracy=0.5000\n"


def test_the_context_is_that_of_an_only_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_DATA", "/data")
    assert isthmus.context() == isthmus.Context(data="/data")


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_wrong_number_of_examples(count: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        for rnd in isthmus.rounds(torch.nn.Linear(1, 1)):
            rnd.submit(num_examples=count)


def test_twice() -> None:
    rnd = next(iter(isthmus.rounds(torch.nn.Linear(1, 1))))
    rnd.submit(num_examples=1)
    with pytest.raises(RuntimeError, match="called twice"):
        rnd.submit(num_examples=1)


def test_an_environment_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_ENDPOINT", "localhost:1")
    monkeypatch.setenv("ISTHMUS_INDEX", "first")
    with pytest.raises(ValueError, match="ISTHMUS_INDEX must be a whole number, not 'first'"):
        isthmus.context()
