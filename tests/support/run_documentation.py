"""Runner of documentation pages: it writes the files that they show, and runs the commands at their ``$`` prompts.

A fenced block with ``title="NAME"`` is a file; one of the language ``console`` holds commands. Blocks of ``sh`` are not
run: they show what a test cannot do (push to a registry, create the test's own environment).
"""

import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Step:
    """File to write, or command to run."""

    command: str = ""
    file: str = ""
    content: str = ""


def steps(page: str) -> Iterator[Step]:
    """Yield the steps of a page in docs/, in its order."""
    for language, title, body in _BLOCK.findall((ROOT / "docs" / page).read_text()):
        if title:
            yield Step(file=title, content=body)
        elif language == "console":
            for line in body.splitlines():
                assert line.startswith("$ "), f"{page}: no command and no output that could be compared: {line}"
                yield Step(command=line.removeprefix("$ "))


@dataclass
class Walk:
    """Run of a page: its directory, and the replacements for names in the examples."""

    directory: Path
    environment: Mapping[str, str]
    instead: Mapping[str, str] = field(default_factory=dict)
    wrapped: Callable[[list[str]], list[str]] = lambda argv: argv
    """Wraps each command, for example to run it in the lab."""
    said: list[str] = field(default_factory=list)
    _background: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def follow(self, page: str, wanted: Callable[[Step], bool] = lambda step: True) -> None:
        """Follow the page, or only the wanted steps. A command that fails fails the test and shows its output."""
        for step in filter(wanted, steps(page)):
            if step.file:
                path = self.directory / step.file
                path.write_text(self._here(step.content))
                path.chmod(0o644)
            elif step.command.endswith(" &"):
                command = self._here(step.command.removesuffix(" &"))
                self._background.append(self._start(command))
            else:
                self._run(self._here(step.command))

    def close(self) -> None:
        """Stop the background processes."""
        for process in self._background:
            process.terminate()
            process.wait()

    def _here(self, text: str) -> str:
        for ours, theirs in self.instead.items():
            text = text.replace(ours, theirs)
        return text

    def _run(self, command: str) -> None:
        done = subprocess.run(
            self.wrapped(["bash", "-euc", command]), cwd=self.directory, env=dict(self.environment),
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        self.said.append(f"$ {command}\n{done.stdout}{done.stderr}")
        assert done.returncode == 0, self.said[-1]

    def _start(self, command: str) -> subprocess.Popen[bytes]:
        with (self.directory / "background.log").open("wb") as log:
            # exec: the signal that stops it must reach the program itself.
            return subprocess.Popen(
                self.wrapped(["bash", "-euc", f"exec {command}"]), cwd=self.directory, env=dict(self.environment),
                stdout=log, stderr=log,
            )  # fmt: skip
