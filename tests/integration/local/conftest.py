"""Fixtures for tests of real ``isthmus run`` processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

DEADLINE = 240.0


class Run:
    """A process of ``isthmus run``."""

    def __init__(self, manifest: Path, directory: Path, *options: str, under: Sequence[str] = ()) -> None:
        """``under``: a command line to which the run's own is appended."""
        self.directory = directory
        self._files = [manifest.with_suffix(f".{time.monotonic_ns()}.{name}") for name in ("out", "err")]
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            # Under nohup or in the background the tests ignore signals, and so would the programs that they start.
            before = ["env", "--default-signal=HUP,INT,QUIT", *under]
            self.process = subprocess.Popen(
                [*before, sys.executable, "-m", "isthmus", "run", str(manifest), "--dir", str(directory), *options],
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                cwd=manifest.parent,
            )

    @property
    def out(self) -> str:
        return self._files[0].read_text()

    @property
    def err(self) -> str:
        return self._files[1].read_text()

    def wait_for_line(self, start: str) -> None:
        """Wait for an output line with this beginning; fail immediately if the run ends without it."""

        def seen() -> bool:
            ended = self.process.poll() is not None
            found = any(line.startswith(start) for line in self.out.splitlines())
            assert found or not ended, f"ended without {start!r}: {self.out}\n{self.err}"
            return found

        self.wait_for(seen, f"{start!r} in {self.out}\n{self.err}")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until the condition holds; fail after the deadline."""
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, f"not within {DEADLINE:.0f} s: {what}"
            time.sleep(0.05)

    def finish(self) -> int:
        """Wait for the end of the run; return its exit code."""
        return self.process.wait(DEADLINE)

    def processes(self) -> dict[int, str]:
        """Return all live processes of this run by id: their environment or command line names its directory."""
        mark = os.fsencode(self.directory)
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in (self.process.pid, os.getpid()):
                continue
            try:
                command = (entry / "cmdline").read_bytes()
                if command and (mark in command or mark in (entry / "environ").read_bytes()):
                    found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # ended, or of another user
                continue
        return found

    def programs(self) -> dict[int, str]:
        """Return the run's processes without their supervisors."""
        return {pid: command for pid, command in self.processes().items() if "supervisor.py" not in command}

    def pid(self, word: str) -> int:
        """Return the id of the program whose command line contains the word."""
        return next(pid for pid, command in self.programs().items() if word in command)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


class Start(Protocol):
    """Return ``start(spec, *options)``, which runs a job of two clients, one in each pool, in the test's directory.

    Without a task in the spec, the script is counting_script.py.
    """

    def __call__(self, spec: dict[str, Any], *options: str, under: Sequence[str] = ()) -> Run: ...


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Function that starts runs. Runs that are left at the end are killed."""
    runs: list[Run] = []

    def start_one(spec: dict[str, Any], *options: str, under: Sequence[str] = ()) -> Run:
        manifest = tmp_path / "job.yaml"
        pools = [
            {"name": "cloud", "replicas": 1, "cloud": {}},
            {"name": "hpc", "replicas": 1, "hpc": {"siteRef": {"name": "s"}, "environment": "e"}},
        ]
        task = {"image": "unused", "command": ["python", str(Path(__file__).with_name("counting_script.py"))]}
        job = {"apiVersion": "isthmus.dev/v1alpha1", "kind": "FederatedJob", "metadata": {"name": "demo"}}
        manifest.write_text(yaml.safe_dump({**job, "spec": {"pools": pools, "task": task, **spec}}))
        runs.append(Run(manifest, tmp_path / "run", *options, under=under))
        return runs[-1]

    yield start_one
    for run in runs:
        run.kill()
