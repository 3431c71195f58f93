"""Runs in users' environments: shells, pipes, terminals, launchers, and scripts that change directory."""

import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.integration.local.conftest import Start

ENDLESS = 100_000
SCRIPT = Path(__file__).with_name("counting_script.py")
pytestmark = pytest.mark.timeout(900)


def task(*command: str) -> dict[str, Any]:
    return {"task": {"image": "unused", "command": list(command)}}


def test_a_script_may_change_its_directory(start: "Start", tmp_path: Path) -> None:
    """The script changes directory before its rounds, with a relative run directory."""
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "moving.py"
    script.write_text(f"import os, runpy\nos.chdir({str(tmp_path / 'elsewhere')!r})\nrunpy.run_path({str(SCRIPT)!r})\n")
    run = start({"rounds": 2, **task("python", str(script))}, "--dir", "here")
    assert run.finish() == 0, run.err
    assert "model: here/model.pt" in run.out
    assert (tmp_path / "here" / "model.pt").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_killing_the_runner_ends_what_torchrun_and_shells_have_started(start: "Start") -> None:
    script = "import os, time, isthmus, torch; torch.distributed.init_process_group('gloo'); m = torch.nn.Linear(1, 1)"
    loop = "\nfor r in isthmus.rounds(m):\n    time.sleep(0.01); r.submit(num_examples=1)\n"
    shell = 'f=$(mktemp -p .) && printf %s "$0" > "$f" && torchrun --standalone --nproc-per-node 2 "$f"'
    run = start({"rounds": ENDLESS, **task("sh", "-c", shell, script + loop)})
    run.wait_for_line("round 1/")
    assert len(run.programs()) == 9  # the aggregator, and for each client the shell, torchrun and two ranks
    run.kill()
    run.wait_for(lambda: run.processes() == {}, "every process gone")


def test_nohup_holds(start: "Start") -> None:
    run = start({"rounds": ENDLESS}, under=["nohup"])
    run.wait_for_line("round 1/")
    run.process.send_signal(signal.SIGHUP)
    before = len(run.out.splitlines())
    run.wait_for(lambda: len(run.out.splitlines()) > before + 3, "more rounds")
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130


def test_a_terminal_that_goes_away_ends_a_run_as_other_signals_do(start: "Start") -> None:
    run = start({"rounds": ENDLESS})
    run.wait_for_line("round 1/")
    run.process.send_signal(signal.SIGHUP)
    assert run.finish() == 128 + signal.SIGHUP
    assert run.processes() == {}


def test_a_run_without_a_reader_continues_to_train(start: "Start") -> None:
    run = start({"rounds": 3}, under=["bash", "-o", "pipefail", "-c", '"$@" | head -n 1', "bash"])
    assert run.finish() == 0, run.err
    assert run.err == "standard output: Broken pipe; the run continues\n"
    assert len(run.out.splitlines()) == 1
    assert (run.directory / "model.pt").exists()


def test_a_terminal_ends_with_the_result(start: "Start") -> None:
    run = start({"rounds": 2}, under=["sh", "-c", 'script -qefc "$*" /dev/null', "sh"])
    assert run.finish() == 0, run.out
    lines = [text for line in run.out.splitlines() if (text := re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", line).strip())]
    assert "connected" in run.out and any("complete: 2 rounds" in line for line in lines[-3:])
    assert lines[-1].startswith("model: ")


@pytest.mark.parametrize("closing", [">&- 2>&-", ">/dev/full"])
def test_a_run_needs_no_output(start: "Start", closing: str) -> None:
    run = start({"rounds": 1}, under=["sh", "-c", f'"$@" {closing}', "sh"])
    assert run.finish() == 0, run.err
    assert "Traceback" not in run.err
    assert (run.directory / "model.pt").exists()


def test_a_shell_in_ascii_in_which_torchrun_left_its_variables(start: "Start", monkeypatch: pytest.MonkeyPatch) -> None:
    left = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "nowhere", "LOCAL_RANK": "1"}
    for name, value in {**left, "PYTHONIOENCODING": "ascii", "METRIC": "pr\u00e9cision"}.items():
        monkeypatch.setenv(name, value)
    run = start({"rounds": 1})
    assert run.finish() == 0, run.err
    assert "pr\\xe9cision 1.0000" in run.out


def test_a_run_ends_when_only_evaluators_are_left(start: "Start") -> None:
    command = "import isthmus, runpy; assert isthmus.context().pool != 'hpc', 'no data'; runpy.run_path({!r})"
    pools = [
        {"name": "hpc", "replicas": 2, "hpc": {"siteRef": {"name": "s"}, "environment": "e"}},
        {"name": "judges", "replicas": 2, "cloud": {}, "role": "Evaluate"},
    ]
    run = start({"rounds": 2, "pools": pools, "backoffLimit": 0, **task("python", "-c", command.format(str(SCRIPT)))})
    assert run.finish() == 1
    assert run.processes() == {}
    assert "1 of 2 clients that train remain (1 failed) where a round needs 2; hpc-" in run.err
    assert "AssertionError: no data" in run.err.splitlines()[-1]
