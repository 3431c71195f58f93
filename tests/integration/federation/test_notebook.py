"""isthmus.rounds in a notebook, where exceptions do not end the process, and cells are run again."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Federation, eventually

pytest.importorskip("IPython", reason="needs IPython: pip install ipython")

Make = Callable[..., Federation]

SETUP = """
import torch, isthmus, pathlib
torch.set_num_threads(1)
model = torch.nn.Linear(2, 1)
# ---
"""
LOOP = """
for rnd in isthmus.rounds(model):
    optimizer = rnd.wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    {extra}
    rnd.submit(num_examples=4)
"""


def start(job: Federation, *cells: str, **env: str) -> None:
    (job.directory / "cells.py").write_text(SETUP + "# ---\n".join(cells))
    notebook = Path(__file__).with_name("notebook.py")
    environment = {**job.client_environment(), "IPYTHONDIR": str(job.directory / "ipython"), **env}
    job.start("notebook", [notebook], environment)


def outcomes(job: Federation) -> list[str]:
    path = job.directory / "outcomes.json"
    try:
        found: list[str] = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return found


@pytest.mark.parametrize("thread", ["", "yes"], ids=["main thread", "another thread"])
def test_a_cell_that_raises_is_reported_and_can_be_run_again(federation: Make, thread: str) -> None:
    job = federation(1, 3)
    job.start_aggregator()
    bad = LOOP.format(extra="raise ValueError('no such column: age')")
    good = "while not pathlib.Path('go').exists(): pass\n" + LOOP.format(extra="pass")
    start(job, bad, good, THREAD=thread)
    failure = eventually("the failure is known", lambda: job.status().pools[0].failures)[0]
    assert failure.message == "ValueError: no such column: age"
    assert "raise ValueError" in failure.traceback
    (job.directory / "go").touch()
    job.wait_for_completion()
    eventually("the cell has ended", lambda: len(outcomes(job)) == 3)
    assert outcomes(job) == ["ok", "ValueError", "ok"]


def test_an_interrupted_cell_is_no_failure_and_can_be_run_again(federation: Make) -> None:
    job = federation(1, 3)
    job.start_aggregator()
    # The interrupt hits the script's own code.
    training = LOOP.format(extra="pathlib.Path('interrupt').touch()\n    while True: pass  # INTERRUPTED")
    start(job, training, LOOP.format(extra="pass"))
    job.wait_for_completion()
    eventually("the cell has ended", lambda: len(outcomes(job)) == 3)
    assert outcomes(job) == ["ok", "KeyboardInterrupt", "ok"]
    assert job.log("aggregator").count("failed") == 0


def test_an_interrupt_while_waiting_leaves_nothing_behind(federation: Make) -> None:
    job = federation(2, 1)
    job.start_aggregator()
    cell = "hooks = (__import__('sys').excepthook, __import__('signal').getsignal(15))\n" + LOOP.format(extra="pass")
    check = "assert hooks == (__import__('sys').excepthook, __import__('signal').getsignal(15))\n"
    threads = "assert not [t for t in __import__('threading').enumerate() if t.name.startswith('isthmus')]\n"
    start(job, cell + "# INTERRUPTED\n", check + threads)
    eventually("it is connected", lambda: job.status().pools[0].connected == 1)
    # The loop's last action before it waits.
    eventually("its hooks are set", lambda: job.processes[-1].handles(signal.SIGTERM))
    (job.directory / "interrupt").touch()
    eventually("the cells have ended", lambda: len(outcomes(job)) == 3)
    assert outcomes(job) == ["ok", "KeyboardInterrupt", "ok"]
    eventually("it is gone", lambda: job.status().pools[0].connected == 0)


def test_a_loop_may_be_spread_over_cells(federation: Make) -> None:
    job = federation(1, 2)
    job.start_aggregator()
    body = "rnd = next(loop)\nmodel.weight.data += 1\nrnd.submit(num_examples=4)\n"
    start(job, "loop = isthmus.rounds(model)\n", body, "1 / 0\n", body, "assert next(loop, None) is None\n")
    job.wait_for_completion()
    eventually("the cells have ended", lambda: len(outcomes(job)) == 6)
    assert outcomes(job) == ["ok", "ok", "ok", "ZeroDivisionError", "ok", "ok"]
