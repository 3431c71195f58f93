"""Client of the helper, which it runs as another user through sudo."""

import base64
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from isthmus_contracts.identities import slurm_job_name

from ..policy.policy import Policy
from ..slurm.command import CommandOutputTooLong, CommandTimeout, Result, Runner, run
from ..slurm.environment import DEFAULT_PATH
from ..slurm.model import Submission
from ..slurm.run_as import AsUserError
from .helper import PROTOCOL
from .sudoers import command

# Enough for the ends of a hundred logs, doubled for JSON's escapes. Bytes.
_MAX_ANSWER = 64 << 20
_ENVIRONMENT = {"PATH": f"{DEFAULT_PATH}:/usr/sbin:/sbin", "LC_ALL": "C"}


class AsUser:
    """Operations as local users: a :class:`~..slurm.run_as.Delegate`, and further requests by :meth:`ask`."""

    def __init__(self, policy: Policy, runner: Runner = run, clock: Callable[[], float] = time.time) -> None:
        self._policy = policy
        self._runner = runner
        self._clock = clock

    def ask(self, user: str, do: str, key: str = "", deadline: float | None = None, **fields: Any) -> Any:
        """Send a request to the helper and return its result. ``deadline``: seconds since the epoch.

        Raises :class:`AsUserError`.
        """
        now = self._clock()
        deadline = now + self._policy.slurm.command_timeout_seconds if deadline is None else deadline
        request = {"protocol": PROTOCOL, "do": do, "key": key, "deadline": deadline, **fields}
        try:
            result = self._runner(
                command(self._policy, user), env=_ENVIRONMENT, timeout=max(0.1, deadline - now),
                max_output=_MAX_ANSWER, content=json.dumps(request).encode(),
            )  # fmt: skip
        except (CommandTimeout, CommandOutputTooLong) as error:
            raise AsUserError(f"as the local user {user}: {error}", begun=True) from None
        except OSError as error:
            raise AsUserError(f"as the local user {user}: sudo: {error.strerror}") from None
        return _result(user, result)

    def submit(self, submission: Submission, deadline: float) -> Result:
        """Run sbatch."""
        job = {
            name: getattr(submission, name)
            for name in (
                "tasks", "steps", "at_once", "comment", "partition", "account", "qos", "time_limit_seconds",
                "warning_seconds", "cpus_per_task", "memory_mib",
            )
        }  # fmt: skip
        job["options"] = submission.options.stated()
        job["gres"] = [[gres.name, gres.type, gres.count] for gres in submission.gres]
        return _finished(self.ask(submission.user, "submit", _key(submission.name), deadline, job=job))

    def cancel(self, user: str, name: str, array_id: int, first: int, last: int | None) -> Result:
        """Run scancel."""
        return _finished(self.ask(user, "cancel", name=name, array=array_id, first=first, last=last))


def encoded(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the files as a request holds them, in base64."""
    return {name: base64.b64encode(content).decode("ascii") for name, content in files.items()}


def _key(name: str) -> str:
    return name.removeprefix(slurm_job_name(""))


def _finished(answer: Any) -> Result:
    try:
        return Result(int(answer["status"]), str(answer["output"]), str(answer["errors"]))
    except (LookupError, TypeError, ValueError):
        raise AsUserError("the helper's answer is malformed", begun=True) from None


def _result(user: str, result: Result) -> Any:
    who = f"as the local user {user}"
    try:
        answer = json.loads(result.output) if result.status == 0 else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        lines = [line.strip() for line in result.errors.splitlines() if line.strip()]
        words = lines[-1][:300] if lines else f"exit code {result.status}"
        # Refused by sudo itself, or by the helper before it read the request.
        no = result.status in (1, 2) and not result.output and words.startswith(("sudo: ", "isthmus-bridge: "))
        raise AsUserError(f"{who}: {words}", begun=not no)
    if "result" in answer:
        return answer["result"]
    if "open" in answer:
        raise AsUserError(f"{who}: {answer['open']}", begun=True, errors=str(answer.get("errors", "")))
    raise AsUserError(f"{who}: {answer.get('refused') or answer.get('error') or 'no reason given'}")
