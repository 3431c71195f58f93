"""Child processes of a script: they end as they would without Isthmus, and are not clients."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .conftest import Federation

Make = Callable[..., Federation]

REFUSED = "isthmus.FederationError: this process is a child of the client's process, which takes part already"
FORKS = """
import os, signal, subprocess, sys, time
import torch
import isthmus

def told(pid, what):
    print(what, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

def evaluate():
    if (pid := os.fork()) == 0:
        raise ValueError("in a fork of evaluate")
    told(pid, "evaluate")
    return {"accuracy": 1.0}

CHILD = "import isthmus, torch; next(isthmus.rounds(torch.nn.Linear(1, 1)))"
model = torch.nn.Linear(1, 1)
for rnd in isthmus.rounds(model, evaluate=evaluate):
    if (pid := os.fork()) == 0:
        raise ValueError("in a fork")
    told(pid, "raises")
    if (pid := os.fork()) == 0:
        time.sleep(600)
    os.kill(pid, signal.SIGTERM)
    told(pid, "terminated")
    if (pid := os.fork()) == 0:
        rnd.submit(num_examples=1)
    told(pid, "submits")
    if (pid := os.fork()) == 0:
        continue
    told(pid, "goes on")
    print("afresh", subprocess.run([sys.executable, "-c", CHILD]).returncode, flush=True)
    torch.nn.init.ones_(model.weight)
    rnd.submit(num_examples=1)
"""
EXPECTED = ["raises 1", "terminated -15", "submits 1", "goes on 1", "afresh 1", "evaluate 1"]


def test_children_end_by_themselves_and_the_round_goes_on(federation: Make, tmp_path: Path) -> None:
    script = tmp_path / "forks.py"
    script.write_text(FORKS)
    job = federation(1, 1)
    job.start_aggregator()
    client = job.start("client-0", [script], job.client_environment())
    assert client.wait() == 0, job.log("client-0")
    assert job.wait_for_completion().completed_rounds == 1
    log = job.log("client-0").splitlines()
    assert [line for line in log if line in EXPECTED] == EXPECTED
    assert sum(line.startswith(REFUSED) for line in log) == 1
    assert "told to stop" not in job.log("client-0")
    assert sum("this process was forked from the client's" in line for line in log) == 2


def test_a_script_without_a_main_guard_gets_an_explanation(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "import multiprocessing, torch, isthmus\n"
        "def work(): pass\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=work)\n"
        "    child.start()\n"
        "    child.join()\n"
        "    raise SystemExit(child.exitcode)\n"
        "next(isthmus.rounds(torch.nn.Linear(1, 1)))\n"
    )
    env = {"PATH": "", "ISTHMUS_ENDPOINT": "127.0.0.1:1", "ISTHMUS_POOL": "pool"}
    ended = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(REFUSED)
    assert '`if __name__ == "__main__":`' in ended.stderr
    assert "Traceback" not in ended.stderr


def test_ranks_that_a_trainer_starts_are_refused_with_a_hint_at_torchrun(tmp_path: Path) -> None:
    """A client whose ranks Lightning's launcher starts is refused with the reason."""
    script = tmp_path / "launching.py"
    script.write_text(
        "import os, subprocess, sys\n"
        "if 'LOCAL_RANK' not in os.environ:\n"
        "    ranks = {'ISTHMUS_TAKEN_BY': str(os.getpid()), 'LOCAL_RANK': '1', 'WORLD_SIZE': '2'}\n"
        "    raise SystemExit(subprocess.run([sys.executable, __file__], env={**os.environ, **ranks}).returncode)\n"
        "import torch, isthmus\n"
        "next(isthmus.rounds(torch.nn.Linear(1, 1)))\n"
    )
    ended = subprocess.run([sys.executable, script], env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(REFUSED)
    assert "torchrun starts the script" in ended.stderr and "__main__" not in ended.stderr
    assert "Traceback" not in ended.stderr
