"""Progress, errors, subprocesses and the cache, shared by all steps of a build."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Command = Sequence[str | Path]


class BuildError(Exception):
    """Failure of a build, printed as one message without a traceback."""


def say(message: str) -> None:
    print(f"images: {message}", file=sys.stderr, flush=True)


def cache_directory() -> Path:
    """Return the cache directory: kept between builds, safe to delete."""
    configured = os.environ.get("ISTHMUS_CACHE")
    directory = (Path(configured) if configured else Path.home() / ".cache" / "isthmus") / "images"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def output_of(command: Command, timeout: float | None = None) -> str | None:
    """Return the standard output, or None if the command fails, times out or is missing."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def run(command: Command, what: str) -> str:
    """Run the command and return its output. Raises BuildError with the end of the output if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise BuildError(f"{what}: {error}") from error
    if result.returncode:
        words = (result.stderr.strip() or result.stdout.strip()).splitlines()[-8:]
        raise BuildError("\n  ".join([f"{what} failed ({command[0]} ended with {result.returncode}):", *words]))
    return result.stdout.strip()


def run_logged(command: Command, log: Path, what: str, interesting: Callable[[str], str | None]) -> None:
    """Run the command with its output in `log`; show the lines for which `interesting` returns a text."""
    started = time.monotonic()
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
            )
        except OSError as error:
            raise BuildError(f"{what}: {error}") from error
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                shown = interesting(line.rstrip())
                if shown is not None:
                    say(f"  {time.monotonic() - started:5.1f} s  {shown}")
        except BaseException:
            process.terminate()
            raise
        finally:
            code = process.wait()
    if code:
        words = log.read_text(errors="replace").strip().splitlines()[-20:]
        raise BuildError("\n  ".join([f"{what} failed ({command[0]} ended with {code}):", *words, f"whole log: {log}"]))
