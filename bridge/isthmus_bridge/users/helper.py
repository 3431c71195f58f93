"""The only program that sudo lets the bridge run as another user: it executes one request from standard input.

Run as ``python -I -m isthmus_bridge.users.helper --run-dir DIR``. It manages the directories of that user's pools
beneath DIR, submits the batch scripts in them, cancels jobs of that user, and reads their logs; it can do nothing else.
Anyone who may run it can run arbitrary jobs as that user, but nothing else as that user on this machine.

A request and its answer are one JSON object each, with bytes in base64. Only the standard library and light modules
of the bridge are imported, because polls wait for this program.
"""

import argparse
import base64
import json
import os
import pwd
import re
import signal
import stat
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isthmus_contracts.identities import slurm_job_name

from ..files.run_directory import PATTERN_KEY, RunDirectory
from ..slurm import options
from ..slurm.cli import arguments, cancellation, which
from ..slurm.command import CommandOutputTooLong, CommandTimeout, Result, run
from ..slurm.environment import DEFAULT_PATH, program_environment
from ..slurm.model import Gres, Submission

PROTOCOL = 3
MAX_REQUEST = 16 << 20
_LONGEST = 600.0
_MAX_OUTPUT = 1 << 16
# Share of the time left that sbatch gets.
_SHARE = 0.9
_MAX_TAIL = 1 << 20
_MAX_DEPARTURES = 8 << 20
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
# The policy decides what is allowed. These patterns keep values from being options, or being expanded by Slurm.
_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.+-]{0,63})?")
_ACCOUNT = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.+@:/-]{0,63})?")
_COMMENT = re.compile(r"[A-Za-z0-9 ./_-]{0,255}")
_NUMBERS = ("tasks", "time_limit_seconds", "warning_seconds", "cpus_per_task", "memory_mib", "steps", "at_once")


class RefusedError(Exception):
    """The request is invalid. ``str()`` is one line."""


class Helper:
    """Executor of requests, beneath one directory."""

    def __init__(self, root: Path, bin_dir: Path | None, conf: Path | None) -> None:
        self._root = root
        self._env = program_environment(DEFAULT_PATH, {}, bin_dir, conf)
        self._verbs: Mapping[str, Callable[[RunDirectory, Mapping[str, Any], float], Any]] = {
            "create": lambda pool, request, _: pool.create(_files(request["files"])),
            "credentials": lambda pool, request, _: pool.write_credentials(_files(request["files"])),
            "code": lambda pool, request, _: pool.write_code(_files(request["files"])),
            "scripts": lambda pool, request, _: pool.write_scripts(_text(request["batch"]), _text(request["client"])),
            "known": lambda pool, *_: pool.script.exists(),
            "forget": lambda pool, *_: pool.forget_credentials(),
            "remove": lambda pool, *_: pool.remove(),
            "marks": lambda pool, *_: {index: asdict(marks) for index, marks in pool.task_markers().items()},
            "exits": lambda pool, request, _: {
                index: asdict(found) for index, found in pool.exits(frozenset(request["wanted"])).items()
            },
            "tails": lambda pool, request, _: pool.tails(
                [_number(index) for index in request["indices"]], _number(request["lines"]),
                min(_MAX_TAIL, _number(request["limit"])), of_jobs=request["of_jobs"] is True,
            ),
            "log": lambda pool, request, _: pool.log_tail(
                _number(request["index"]), _number(request["lines"]), min(_MAX_TAIL, _number(request["limit"]))
            ),
            "departures": lambda pool, request, _: {
                index: [start, base64.b64encode(data).decode("ascii")]
                for index, (start, data) in pool.departures(
                    {int(index): _number(offset) for index, offset in request["offsets"].items()},
                    frozenset(request["full"]), min(_MAX_TAIL, _number(request["piece"])),
                    min(_MAX_DEPARTURES, _number(request["most"])),
                ).items()
            },
            "submit": self._submit,
        }  # fmt: skip

    def answer(self, request: Mapping[str, Any]) -> Any:
        """Execute a request and return its result.

        Raises ``OSError``, :class:`RefusedError`, and Python's own errors for a malformed request.
        """
        if request["protocol"] != PROTOCOL:
            raise RefusedError("the installed bridge is another version than the running one; restart it")
        # SIGALRM, which has no handler, ends this process after the deadline.
        left = min(_LONGEST, float(request["deadline"]) - time.time())
        if left <= 0:
            raise RefusedError("the request came too late")
        signal.setitimer(signal.ITIMER_REAL, left + 1.0)
        self._own_root()
        if request["do"] == "hello":
            return {"user": pwd.getpwuid(os.getuid()).pw_name, "sbatch": which("sbatch", self._env["PATH"])}
        if request["do"] == "cancel":
            return self._cancel(request, left)
        key = request["key"]
        if re.fullmatch(PATTERN_KEY, key) is None or "\n" in key:
            raise RefusedError("malformed key")
        return self._verbs[request["do"]](RunDirectory(self._root, key), request, left)

    def _own_root(self) -> None:
        """Make the directory of all pools if it is missing, and refuse one that others may enter."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self._root.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise RefusedError(f"{self._root} must be a directory that this user owns, with mode 0700")

    def _submit(self, pool: RunDirectory, request: Mapping[str, Any], left: float) -> Any:
        job = request["job"]
        numbers: dict[str, Any] = {name: _number(job[name]) for name in _NUMBERS}
        names: dict[str, Any] = {name: _matching(_NAME, job[name]) for name in ("partition", "qos")}
        gres = tuple(Gres(_matching(_NAME, n), _matching(_NAME, t), _number(c)) for n, t, c in job["gres"])
        wanted = Submission(
            name=slurm_job_name(pool.path.name), script=pool.script, directory=pool.path,
            output=pool.log_pattern if numbers["steps"] == 1 else pool.job_log_pattern,
            comment=_matching(_COMMENT, job["comment"]), gres=gres, account=_matching(_ACCOUNT, job["account"]),
            options=options.read(job["options"]), **names, **numbers,
        )  # fmt: skip
        timeout = which("timeout", self._env["PATH"])
        guard = [timeout, "--signal=KILL", f"{left:g}"]
        # The rest of the time is for the answer, which reports sbatch's result.
        return self._run([*guard, which("sbatch", self._env["PATH"]), *arguments(wanted)], left * _SHARE)

    def _cancel(self, request: Mapping[str, Any], left: float) -> Any:
        last = request["last"]
        # The pool's array may have been renamed, so any name is valid; it follows its option's `=`.
        name, array_id, first = _text(request["name"]), _number(request["array"]), _number(request["first"])
        program, *rest = cancellation(os.getuid(), name, array_id, first, None if last is None else _number(last))
        return self._run([which(program, self._env["PATH"]), *rest], left)

    def _run(self, argv: list[str], left: float) -> Any:
        return asdict(run(argv, env=self._env, timeout=left, max_output=_MAX_OUTPUT))


def _files(listed: Mapping[str, str]) -> dict[str, bytes]:
    return {_matching(_FILE, name): base64.b64decode(content, validate=True) for name, content in listed.items()}


def _matching(pattern: re.Pattern[str], text: str) -> str:
    if pattern.fullmatch(text) is None:
        raise RefusedError("malformed value")
    return text


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= 1 << 40:
        raise RefusedError("malformed number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise RefusedError("malformed text")
    return value


def respond(helper: Helper, content: bytes) -> dict[str, Any]:
    """Return the answer to a request: a result, an error, or that it is unknown whether sbatch submitted the job."""
    try:
        return {"result": helper.answer(json.loads(content))}
    except RefusedError as error:
        return {"refused": str(error)}
    except CommandTimeout as error:
        return {"open": "sbatch did not answer in time", "errors": error.errors}
    except CommandOutputTooLong as error:
        return {"open": str(error)}
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return {"error": f"{where}{error.strerror}"}
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return {"refused": "malformed request"}


def main() -> int:
    """Answer one request. Return the exit code."""
    parser = argparse.ArgumentParser(prog="isthmus_bridge.users.helper")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--bin-dir", type=Path)
    parser.add_argument("--conf", type=Path)
    options = parser.parse_args()
    if 0 in os.getresuid():
        print("isthmus-bridge: the helper never runs as root", file=sys.stderr)
        return 2
    os.umask(0o077)
    os.chdir("/")
    content = sys.stdin.buffer.read(MAX_REQUEST + 1)
    if len(content) > MAX_REQUEST:
        print("isthmus-bridge: the request is too long", file=sys.stderr)
        return 2
    json.dump(respond(Helper(options.run_dir, options.bin_dir, options.conf), content), sys.stdout)
    return 0


__all__ = ["PROTOCOL", "Helper", "Result", "respond"]

if __name__ == "__main__":
    sys.exit(main())
