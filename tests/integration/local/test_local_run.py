"""``isthmus run``: a real aggregator, real clients, and everything that may happen to them."""

import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from tests.integration.local.conftest import Start

ENDLESS = 100_000
pytestmark = pytest.mark.timeout(900)


def rounds_told(out: str) -> list[int]:
    return [int(number) for number in re.findall(r"^round (\d+)/", out, re.MULTILINE)]


def weights(path: Path) -> torch.Tensor:
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return torch.cat([state[name].flatten() for name in sorted(state)])


def test_digits_train_and_the_model_loads_in_plain_pytorch(start: "Start") -> None:
    from isthmus_examples import digits
    from isthmus_examples.training import evaluate

    run = start(
        {
            "rounds": 4,
            "task": {"image": "unused", "command": ["python", "-m", "isthmus_examples.digits"]},
            "strategy": {"algorithm": "FedProx", "parameters": {"mu": "0.01"}},
        }
    )
    assert run.finish() == 0, run.err
    assert run.processes() == {}
    assert rounds_told(run.out) == [1, 2, 3, 4]
    number = r"[0-9.e+-]+"
    last = rf"^round 4/4: 2 updates, accuracy {number}, .*train_loss {number}, {number} s$"
    assert re.search(last, run.out, re.MULTILINE)
    best = re.search(r"^best accuracy (\d\.\d+) \(round \d\)$", run.out, re.MULTILINE)
    assert best and float(best[1]) > 0.8
    assert f"model: {run.directory / 'model.pt'}" in run.out

    model = digits.build()
    model.load_state_dict(torch.load(run.directory / "model.pt", weights_only=True))
    told = re.findall(r"accuracy (\d\.\d+)", run.out)
    # The weighted mean of what the clients measured is the accuracy on all held-out data.
    assert f"{evaluate(model, digits.load()[1])['accuracy']:.4f}" == told[3]
    assert torch.equal(weights(run.directory / "model.pt"), weights(run.directory / "model.safetensors"))
    logs = {path.name for path in (run.directory / "logs").iterdir()}
    assert logs == {"aggregator.log", "cloud-0.log", "hpc-0.log"}
    assert not (run.directory / "tls").exists()


def test_an_interrupted_run_leaves_no_process_and_resumes_at_its_round(start: "Start") -> None:
    run = start({"rounds": ENDLESS})
    run.wait_for_line("round 3/")
    assert len(run.programs()) == 3
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130
    assert run.processes() == {}
    stopped = re.search(r"stopped after round (\d+) of 100000; go on with: isthmus run .* --resume$", run.out.strip())
    assert stopped, run.out
    done = int(stopped[1])

    resumed = start({"rounds": done + 3}, "--resume")
    assert resumed.finish() == 0, resumed.err
    assert f"resuming after round {done} of {done + 3}" in resumed.out
    assert rounds_told(resumed.out) == [done + 1, done + 2, done + 3]
    assert torch.equal(weights(run.directory / "model.pt"), torch.full((8,), float(done + 3)))

    again = start({"rounds": done + 3}, "--resume")
    assert again.finish() == 0
    assert f"all {done + 3} rounds were done before" in again.out


def test_a_run_that_is_told_to_end_while_it_starts_leaves_no_process(start: "Start") -> None:
    run = start({"rounds": ENDLESS})
    run.wait_for_line("starting 2 clients")
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 143
    assert run.processes() == {}
    assert "stopped after round 0 of 100000" in run.out


def test_killing_the_runner_leaves_no_process(start: "Start") -> None:
    run = start({"rounds": ENDLESS})
    run.wait_for_line("round 1/")
    run.kill()
    run.wait_for(lambda: run.processes() == {}, "every process gone")


def test_a_killed_client_and_a_killed_aggregator_come_back(start: "Start") -> None:
    run = start({"rounds": ENDLESS})
    run.wait_for_line("round 2/")
    os.kill(run.pid("counting_script.py"), signal.SIGKILL)
    run.wait_for(lambda: "starts again in" in run.err, "the client's restart")
    run.wait_for(lambda: len(run.programs()) == 3, "three processes")
    os.kill(run.pid("isthmus.aggregator"), signal.SIGKILL)
    run.wait_for(lambda: "starting it again from its last checkpoint" in run.err, "the aggregator's restart")
    before = len(rounds_told(run.out))
    run.wait_for(lambda: len(rounds_told(run.out)) > before + 3, "more rounds")
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130
    assert "killed by SIGKILL" in run.err
    told = rounds_told(run.out)
    assert told == list(range(1, len(told) + 1))
    newest = sorted((run.directory / "checkpoints").iterdir())[-1]
    assert torch.equal(weights(newest), torch.full((8,), float(int(newest.stem.removeprefix("round-")))))


def test_a_script_that_raises_shows_its_traceback_and_the_others_go_on(
    start: "Start", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "1")
    run = start({"rounds": ENDLESS, "backoffLimit": 0, "selection": {"minClients": 1}})
    run.wait_for(lambda: "hpc-0 is given up" in run.err, "the end of a client")
    assert "hpc-0 failed (exit code 1)" in run.err
    assert "ValueError: client 1 has had enough" in run.err
    assert "counting_script.py" in run.err  # the traceback's lines
    before = len(rounds_told(run.out))
    run.wait_for(lambda: len(rounds_told(run.out)) > before + 3, "more rounds")
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130
    # The aggregator heard of it, and did not wait for the client to come back.
    assert (
        "hpc/0 failed: ValueError: client 1 has had enough" in (run.directory / "logs" / "aggregator.log").read_text()
    )


def test_a_round_that_waits_says_why(start: "Start", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIVERGE", "1")
    run = start({"rounds": ENDLESS})
    why = "round 2 has 1 of 2 needed updates; waiting for clients; refused: hpc/0: weight holds NaN or infinity"
    run.wait_for(lambda: why in run.err.splitlines(), why)
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130


def test_a_run_ends_when_too_few_clients_are_left(start: "Start") -> None:
    command = ["python", "-c", "raise ValueError('no data here')"]
    run = start({"rounds": 2, "task": {"image": "unused", "command": command}, "backoffLimit": 1})
    assert run.finish() == 1
    assert run.processes() == {}
    assert "ValueError: no data here" in run.err
    assert "attempt 1 of 1" in run.err
    end = r"^isthmus: 1 of 2 clients remain \(1 failed\) where a round needs 2; (cloud|hpc)-0: ValueError: no data here; the logs are in "
    assert re.search(end, run.err, re.MULTILINE)


def test_a_program_that_does_not_exist_is_named(start: "Start") -> None:
    task = {"image": "unused", "command": ["no-such-program"]}
    run = start({"rounds": 2, "task": task, "backoffLimit": 0})
    assert run.finish() == 1
    assert "no-such-program: No such file or directory" in run.err


def test_a_run_ends_at_its_deadline(start: "Start") -> None:
    run = start({"rounds": ENDLESS, "activeDeadlineSeconds": 1})
    assert run.finish() == 1
    assert run.processes() == {}
    assert run.err.startswith("isthmus: not complete after activeDeadlineSeconds (1 s)")


def test_a_checkpoint_that_cannot_be_read_is_said_in_one_line(start: "Start", tmp_path: Path) -> None:
    broken = tmp_path / "run" / "checkpoints" / "round-000009.safetensors"
    broken.parent.mkdir(parents=True)
    (tmp_path / "run" / "job.json").write_text('{"uid": "u", "name": "demo"}')
    broken.write_bytes(b"torn")
    run = start({"rounds": 10}, "--resume")
    assert run.finish() == 1
    assert str(broken) in run.err and len(run.err.splitlines()) == 1
