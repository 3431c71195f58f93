"""Logs of scripts that torchrun or accelerate started."""

import pytest

from isthmus_contracts.launchers import script_lines
from isthmus_contracts.text import last_lines

RAISED = """
[rank1]: Traceback (most recent call last):
[rank1]:   File "train.py", line 1, in <module>
[rank1]:     import nosuchmodule
[rank1]: ModuleNotFoundError: No module named 'nosuchmodule'
""".strip().splitlines()
PLAIN = [line.removeprefix("[rank1]: ") for line in RAISED]
AGENT = [
    "W1129 16:34:27.1 22958 torch/distributed/elastic/multiprocessing/api.py:1010] Sending process 1 closing signal",
    "E1129 16:34:27.2 22958 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) local_rank: 0",
]
TORCHRUN = """
Traceback (most recent call last):
  File "/venv/bin/torchrun", line 6, in <module>
    sys.exit(main())
             ^^^^^^
  File "/venv/torch/distributed/run.py", line 1019, in run
    elastic_launch(
  File "/venv/torch/distributed/launcher/api.py", line 383, in launch_agent
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
train.py FAILED
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  exitcode  : 1 (pid: 23835)
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
""".strip().splitlines()
ACCELERATE = """
Traceback (most recent call last):
  File "/venv/bin/accelerate", line 8, in <module>
    sys.exit(main())
  File "/venv/accelerate/commands/launch.py", line 1069, in launch_command
    simple_launcher(args)
subprocess.CalledProcessError: Command '['python', 'train.py']' returned non-zero exit status 1.
""".strip().splitlines()


@pytest.mark.parametrize("report", [[*AGENT, *TORCHRUN], TORCHRUN, ["", *ACCELERATE]])
@pytest.mark.parametrize("script", [RAISED, PLAIN, ["epoch 1", "isthmus.ScriptError: loss must be a number, not None"]])
def test_the_scripts_own_exception_is_the_end(script: list[str], report: list[str]) -> None:
    assert script_lines([*script, *report]) == script
    assert last_lines("\n".join([*script, *report]), 1, 300) == script[-1]


@pytest.mark.parametrize(
    "log",
    [
        [],
        ["epoch 1", "epoch 2"],
        PLAIN,
        ["epoch 1", *AGENT, *TORCHRUN],  # sys.exit(3): only the report shows it
        [*PLAIN, "During handling of the above exception, another exception occurred:", *PLAIN],
        [*PLAIN, "Traceback (most recent call last):", '  File "train.py", line 2', "subprocess.CalledProcessError: x"],
    ],
)
def test_other_logs_stay_as_they_are(log: list[str]) -> None:
    assert script_lines(log) == log
