"""``isthmus run`` with a real aggregator and real clients, and their failures."""

import json
import os
import re
import signal
import socket
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
    # The weighted mean of the clients' metrics is the accuracy on all held-out data.
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
    stopped = re.search(r"stopped after round (\d+) of 100000; resume with: isthmus run .* --resume$", run.out.strip())
    assert stopped, run.out
    done = int(stopped[1])

    resumed = start({"rounds": done + 3}, "--resume")
    assert resumed.finish() == 0, resumed.err
    assert f"resuming after round {done} of {done + 3}" in resumed.out
    assert rounds_told(resumed.out) == [done + 1, done + 2, done + 3]
    assert torch.equal(weights(run.directory / "model.pt"), torch.full((8,), float(done + 3)))

    again = start({"rounds": done + 3}, "--resume")
    assert again.finish() == 0
    assert f"all {done + 3} rounds are already done" in again.out


def test_a_run_that_is_stopped_while_it_starts_leaves_no_process(start: "Start") -> None:
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
    run.wait_for(lambda: "restarting it from its last checkpoint" in run.err, "the aggregator's restart")
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
    assert "counting_script.py" in run.err  # lines of the traceback
    before = len(rounds_told(run.out))
    run.wait_for(lambda: len(rounds_told(run.out)) > before + 3, "more rounds")
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130
    # The aggregator was informed, and did not wait for the client to return.
    assert (
        "hpc/0 failed: ValueError: client 1 has had enough" in (run.directory / "logs" / "aggregator.log").read_text()
    )


def test_a_round_that_waits_says_why(start: "Start", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIVERGE", "1")
    run = start({"rounds": ENDLESS})
    why = (
        "round 2 has 1 of 2 needed updates; waiting for clients; refused: hpc/0: weight holds NaN or infinity; a lower"
    )
    run.wait_for(lambda: any(line.startswith(why) for line in run.err.splitlines()), why)
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130


def test_a_run_ends_when_too_few_clients_are_left(start: "Start") -> None:
    # The messages differ, so there is no common failure.
    command = ["python", "-c", "import os; raise ValueError('no data in ' + os.environ['ISTHMUS_POOL'])"]
    run = start({"rounds": 2, "task": {"image": "unused", "command": command}, "backoffLimit": 1})
    assert run.finish() == 1
    assert run.processes() == {}
    assert "ValueError: no data in cloud" in run.err
    assert "attempt 1 of 1" in run.err
    why = "(cloud|hpc)-0: ValueError: no data in (cloud|hpc)"
    end = rf"^isthmus: 1 of 2 clients remain \(1 failed\) where a round needs 2; {why}; the logs are in "
    assert re.search(end, run.err, re.MULTILINE)


def test_a_program_that_does_not_exist_is_named(start: "Start") -> None:
    task = {"image": "unused", "command": ["no-such-program"]}
    run = start({"rounds": 2, "task": task, "backoffLimit": 0})
    assert run.finish() == 2
    assert run.err.startswith("isthmus: task.command: no-such-program: no such program in PATH")
    assert len(run.err.splitlines()) == 1 and not run.directory.exists()


def test_a_failure_that_all_clients_share_ends_the_run_with_its_cause(start: "Start") -> None:
    task = {"image": "unused", "command": ["python", "-c", "import no_such_module"]}
    run = start({"rounds": 2, "task": task})
    assert run.finish() == 1
    assert run.processes() == {}
    cause = (
        "isthmus: every client failed at its start: ModuleNotFoundError: No module named 'no_such_module'; the logs are"
    )
    assert run.err.splitlines()[-1].startswith(cause)
    assert "is given up" not in run.err


def test_the_first_round_waits_for_all_clients_and_runs_agree_bit_for_bit(start: "Start", tmp_path: Path) -> None:
    """The run also ends with a client that is late, and one that never connects."""
    pools = [{"name": "late", "replicas": 2, "cloud": {}}, {"name": "broken", "replicas": 1, "cloud": {}}]
    script = tmp_path / "noisy.py"
    script.write_text(
        "import os, time, torch, isthmus\n"
        "context = isthmus.context()\n"
        "assert context.pool != 'broken', 'no data'\n"
        "if context.index == 1:\n"
        "    time.sleep(3)\n"
        "torch.manual_seed(context.client)\n"
        "model = torch.nn.Linear(7, 5)\n"
        "for rnd in isthmus.rounds(model):\n"
        "    with torch.no_grad():\n"
        "        model.weight.add_(torch.randn(5, 7) / rnd.number)\n"
        "    rnd.submit(num_examples=context.client + 1)\n"
    )
    task = {"image": "unused", "command": ["python", str(script)]}
    models = []
    for name in ("one", "two"):
        spec = {"rounds": 3, "task": task, "pools": pools, "backoffLimit": 0, "stragglers": {"minUpdates": 1}}
        run = start({**spec, "strategy": {"algorithm": "FedAvg", "deterministic": True}}, "--dir", str(tmp_path / name))
        assert run.finish() == 0, run.err
        assert re.search(r"^round 1/3: 2 updates, ", run.out, re.MULTILINE), run.out
        assert re.search(r"^[12] of 3 clients connected$", run.out, re.MULTILINE), run.out
        models.append(weights(tmp_path / name / "model.pt"))
    assert torch.equal(*models)


AFTERWARDS = """
import os, signal, sys, time, torch, isthmus
client, model = isthmus.context().client, torch.nn.Linear(1, 1)
for rnd in isthmus.rounds(model):
    rnd.submit(num_examples=1)
{then}
print("the script has come to its end")
"""


def test_what_follows_the_loop_runs_to_its_end(start: "Start") -> None:
    # A client that connects when training is complete ends, too.
    then = "time.sleep(12)\nif client: raise OSError('no room for the report')"
    late = f"import isthmus, time\nif isthmus.context().pool == 'hpc': time.sleep(5)\n{AFTERWARDS.format(then=then)}"
    spec = {"rounds": 1, "selection": {"minClients": 1}, "stragglers": {"roundDeadlineSeconds": 3600}}
    run = start({**spec, "task": {"image": "unused", "command": ["python", "-c", late]}})
    assert run.finish() == 0, run.err
    assert run.processes() == {}
    assert "training is complete; waiting for the scripts to end" in run.out
    assert (run.directory / "logs" / "cloud-0.log").read_text().endswith("the script has come to its end\n")
    assert "hpc-0 failed after training was complete (exit code 1)" in run.err
    assert run.err.splitlines()[-1] == "  OSError: no room for the report"
    assert run.out.splitlines()[-1].startswith("model: ")


def test_what_follows_the_loop_has_its_bound(start: "Start") -> None:
    task = {"image": "unused", "command": ["python", "-c", AFTERWARDS.format(then="if client: time.sleep(1000)")]}
    run = start({"rounds": 1, "task": task}, "--finish-seconds", "15")
    assert run.finish() == 0, run.err
    assert run.processes() == {}
    assert run.err == "hpc-0: stopped, as the script still ran 15 s after training was complete (--finish-seconds)\n"


def test_an_interrupt_ends_what_follows_the_loop(start: "Start") -> None:
    run = start(
        {
            "rounds": 1,
            "task": {"image": "unused", "command": ["python", "-c", AFTERWARDS.format(then="time.sleep(1000)")]},
        }
    )
    run.wait_for_line("training is complete; ")
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130
    assert run.processes() == {}
    assert run.out.splitlines()[-1].startswith("model: ")


def test_an_aggregator_whose_port_is_taken_is_started_again(start: "Start") -> None:
    run = start({"rounds": ENDLESS, "backoffLimit": 5})
    run.wait_for_line("round 2/")
    aggregator = run.pid("isthmus.aggregator")
    port = json.loads((run.directory / "ports.json").read_text())["port"]
    os.kill(aggregator, signal.SIGKILL)
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    run.wait_for(lambda: taken_now(taken, port), "the port")
    with taken:
        run.wait_for(lambda: f"the aggregator ended (cannot listen on 127.0.0.1:{port}" in run.err, "a failed start")
    before = len(rounds_told(run.out))
    run.wait_for(lambda: len(rounds_told(run.out)) > before + 3, "more rounds")
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130


def taken_now(server: socket.socket, port: int) -> bool:
    try:
        server.bind(("127.0.0.1", port))
        server.listen()
    except OSError:
        return False
    return True


def test_a_run_ends_at_its_deadline(start: "Start") -> None:
    run = start({"rounds": ENDLESS, "activeDeadlineSeconds": 1})
    assert run.finish() == 1
    assert run.processes() == {}
    assert run.err.startswith("isthmus: not complete after activeDeadlineSeconds (1 s)")


def test_an_unreadable_checkpoint_is_reported_in_one_line(start: "Start", tmp_path: Path) -> None:
    broken = tmp_path / "run" / "checkpoints" / "round-000009.safetensors"
    broken.parent.mkdir(parents=True)
    (tmp_path / "run" / "job.json").write_text('{"uid": "u", "name": "demo"}')
    broken.write_bytes(b"torn")
    run = start({"rounds": 10}, "--resume")
    assert run.finish() == 1
    assert str(broken) in run.err and len(run.err.splitlines()) == 1


def test_the_model_that_meets_the_target_is_the_one_in_the_end(start: "Start") -> None:
    """The accuracy of a model in this script is its round."""
    run = start({"rounds": 9, "objective": {"metric": "accuracy", "target": "3"}})
    assert run.finish() == 0, run.err
    assert rounds_told(run.out) == [1, 2, 3]
    end = run.out.splitlines()[-3:]
    assert re.fullmatch(r"complete: 3 rounds in .* s; accuracy met its target, 3", end[0])
    assert end[1:] == ["best accuracy 3.0000 (round 3)", f"model: {run.directory / 'model.pt'} (round 3)"]
    for name in ("model.pt", "model-best.safetensors"):
        assert torch.equal(weights(run.directory / name), torch.full((8,), 3.0))

    again = start({"rounds": 9, "objective": {"metric": "accuracy", "target": "3"}}, "--resume")
    assert again.finish() == 0, again.err
    assert again.out.splitlines()[-1] == end[2]


def test_the_best_model_is_kept_beside_the_last(start: "Start") -> None:
    spec = {"rounds": 5, "objective": {"goal": "Minimize"}, "aggregator": {"checkpoint": {"keep": 1}}}
    run = start(spec)
    assert run.finish() == 0, run.err
    assert run.out.splitlines()[-3:] == [
        "best accuracy 1.0000 (round 1)",
        f"model: {run.directory / 'model.pt'} (round 5)",
        f"best model: {run.directory / 'model-best.pt'} (round 1)",
    ]
    assert torch.equal(weights(run.directory / "model-best.pt"), torch.full((8,), 1.0))
    assert torch.equal(weights(run.directory / "model.pt"), torch.full((8,), 5.0))


def test_warnings_are_shown_while_it_trains(start: "Start") -> None:
    """Warnings for an objective that no client reports, and a directory that MLflow cannot write."""
    mlflow = {"trackingUri": "file:///dev/null/runs"}
    run = start({"rounds": 40, "objective": {"metric": "acuracy"}, "tracking": {"mlflow": mlflow}})
    assert run.finish() == 0, run.err
    expected = "objective.metric: no client reports 'acuracy'; reported: accuracy, train_loss; did you mean accuracy?"
    assert run.err.splitlines().count(expected) == 1
    assert sum(line.startswith("MLflow ") for line in run.err.splitlines()) == 1
