"""Processes that run a script or a module as ``python`` would, forked from one that has imported torch already."""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch.nn.parallel",
        "isthmus.aggregator.__main__",
        "isthmus.client.rounds",
        "IPython",
        "lightning.pytorch",
        "transformers.trainer",
    ]
)


class Forked:
    """A process with the part of the interface of ``subprocess.Popen`` that the tests use."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process

    def wait(self, timeout: float = 180.0) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"still there after {timeout:.0f} s"
        return code

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def handles(self, number: int) -> bool:
        """Return whether the process has set a handler for a signal."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> (number - 1) & 1)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def start(arguments: Sequence[str], directory: Path, log: Path, env: dict[str, str]) -> Forked:
    """Start ``python ARGUMENTS``: a script's path, or ``-m`` and a module, and their arguments."""
    process = _CONTEXT.Process(target=_run, args=(list(arguments), str(directory), str(log), env), daemon=True)
    process.start()
    return Forked(process)


def _run(arguments: list[str], directory: str, log: str, env: dict[str, str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path.insert(0, directory if arguments[0] == "-m" else str(Path(arguments[0]).parent))
    torch.set_num_threads(1)
    code = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)
