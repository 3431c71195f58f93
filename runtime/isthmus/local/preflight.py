"""Check of a job's command before any process starts, so that an error is reported once, not by every client."""

import os
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

_PYTHON = re.compile(r"python(3(\.\d+)?)?")
_PYTHON_OPTIONS_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
# Launchers run the first argument that is a script. They have too many options to parse.
_LAUNCHERS = ("torchrun", "accelerate", "deepspeed")
# Python searches the script's directory before installed packages.
_SHADOWING = ("isthmus.py", "torch.py")
_RUNS_NO_SCRIPT = ("-m", "--module", "--no-python", "--no_python")


class CommandError(Exception):
    """The command cannot run here. ``str()`` is one line with the reason and the remedy."""


def check_command(
    command: Sequence[str], path: str, directory: Path, beside: Path, files: Collection[str] | None = None
) -> None:
    """Raise :class:`CommandError` if the program or its Python script does not exist, or a file shadows a package.

    ``path``: the clients' PATH. ``directory``: their working directory. ``beside``: the manifest's directory.
    ``files``: names of the job's own files, if any, which will be copied into ``directory``.
    """

    def present(name: str) -> bool:
        return str(Path(name)) in (files or ()) or (directory / name).exists()

    program = command[0]
    if os.sep in program:
        if not present(program):
            raise CommandError(f"task.command: {program}: no such file{_seen_from(directory, program)}")
    elif shutil.which(program, path=path) is None:
        raise CommandError(
            f"task.command: {program}: no such program in PATH; is it installed in this Python environment?"
        )
    script = script_of(command)
    if script is None:
        return
    if present(script):
        for name in _SHADOWING:
            if present(hiding := str(Path(script).with_name(name))):
                package = name.removesuffix(".py")
                raise CommandError(f"task.command: {hiding} hides the package {package}: rename the file")
        return
    if files is not None:
        raise CommandError(f"task.command: {script}: not among the files of task.code ({', '.join(sorted(files))})")
    hint = ""
    if not Path(script).is_absolute() and (beside / script).exists():
        hint = f"; it is beside the manifest: start isthmus run in {beside}"
    raise CommandError(f"task.command: {script}: no such file{_seen_from(directory, script)}{hint}")


def script_of(command: Sequence[str]) -> str | None:
    """Return the script that a command of Python or of a launcher runs, if there is one."""
    program, arguments = Path(command[0]).name, list(command[1:])
    if _PYTHON.fullmatch(program):
        return _python_script(arguments)
    if program in _LAUNCHERS:
        scripts = [index for index, word in enumerate(arguments) if word.endswith(".py") and not word.startswith("-")]
        if scripts and not set(arguments[: scripts[0]]).intersection(_RUNS_NO_SCRIPT):
            return arguments[scripts[0]]
    return None


def _python_script(arguments: list[str]) -> str | None:
    skip = False
    for word in arguments:
        if skip:
            skip = False
        elif word in _PYTHON_OPTIONS_WITH_VALUE:
            skip = True
        elif not word.startswith("-"):
            return word
        elif word == "-" or (not word.startswith("--") and {"m", "c"}.intersection(word)):  # -m, -um, -c, stdin
            return None
    return None


def _seen_from(directory: Path, name: str) -> str:
    return "" if Path(name).is_absolute() else f" in {directory}, where the command runs"
