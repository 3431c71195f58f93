"""The exit codes documented in docs/training/training-script.md.

Other tests check 0, and the exit code of a fenced client.
"""

import signal
from collections.abc import Callable
from pathlib import Path

from .conftest import Federation, eventually

Make = Callable[..., Federation]
SCRIPT = Path(__file__).with_name("ranks.py")


def test_sigterm_while_training_is_143_and_the_work_counts(federation: Make) -> None:
    job = federation(1, 5)
    job.start_aggregator()
    client = job.start("client-0", [SCRIPT], job.client_environment(DATA="0", ENDLESS="yes"))
    eventually("it trains", (job.directory / "client-0-rank-0-of-1").exists)
    client.send_signal(signal.SIGTERM)
    assert client.wait() == 143
    job.wait_for_round(1)


def test_a_client_that_the_job_does_not_have_is_refused_with_1(federation: Make) -> None:
    job = federation(1, 1)
    job.start_aggregator()
    client = job.start("client-5", [SCRIPT], {**job.client_environment(5), "DATA": "5"})
    assert client.wait() == 1
    reason = "pool pool has 1 clients; there is no client with index 5"
    assert f"FederationError: the aggregator ended this client's participation: {reason}" in job.log("client-5")
    assert "Traceback" not in job.log("client-5")


def test_unusable_initial_weights_are_reported(federation: Make, tmp_path: Path) -> None:
    script = tmp_path / "masked.py"
    script.write_text(
        "import isthmus, torch\n"
        "model = torch.nn.Linear(2, 2)\n"
        "model.register_buffer('mask', torch.full((2, 2), float('-inf')).triu(1))\n"
        "for rnd in isthmus.rounds(model):\n"
        "    rnd.submit(num_examples=1)\n"
    )
    job = federation(1, 1)
    job.start_aggregator()
    client = job.start("client-0", [script], job.client_environment())
    eventually("the client has ended", lambda: client.poll() is not None, 60)
    assert client.wait() == 1
    said = (
        "FederationError: the initial weights were refused: mask holds NaN or infinity: leave it out,"
        " with isthmus.rounds(..., parameters=...) or, where it is a buffer, by registering it with persistent=False"
    )
    assert job.log("client-0").splitlines()[-1] == f"isthmus.{said}"
    assert "Traceback" not in job.log("client-0")
    failure = eventually("the failure is known", lambda: job.status().pools[0].failures)[0]
    assert (failure.message, failure.traceback) == (said, said)


def test_a_round_without_submit_is_1(federation: Make, tmp_path: Path) -> None:
    script = tmp_path / "forgetful.py"
    script.write_text("import isthmus, torch\nfor rnd in isthmus.rounds(torch.nn.Linear(1, 1)):\n    pass\n")
    job = federation(1, 1)
    job.start_aggregator()
    client = job.start("client-0", [script], job.client_environment())
    assert client.wait() == 1
    failure = eventually("the failure is known", lambda: job.status().pools[0].failures)[0]
    assert failure.message == "FederationError: round 1 ended without rnd.submit(num_examples=...)"
