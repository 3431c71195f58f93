"""The adapter that uses pyslurm, in a new process for each request: see :mod:`.worker`."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus_contracts.slurm_states import meaning, normal

from .. import in_flight, submission_errors
from ..command import CommandOutputTooLong, CommandTimeout, Result, run
from ..environment import DEFAULT_PATH, job_environment, program_environment
from ..model import (
    Patience,
    SiteDescription,
    SlurmError,
    Submission,
    SubmissionAmbiguous,
    SubmissionRefused,
    TaskRecord,
)
from ..options import Options
from ..parse import expand
from . import worker

_MAX_LISTING = 64 << 20
# Additional time for a worker whose bridge has died. Seconds.
_ORPHAN_SECONDS = 2.0
_DESCRIBE_AGAIN = 3600.0
_NOTHING = frozenset({"", "None", "(null)"})

Observer = Callable[[str, float, bool], None]


class PyslurmAdapter:
    """The :class:`~..model.SlurmAdapter` that uses pyslurm. It acts as this user only, which the policy enforces."""

    def __init__(
        self,
        cancel_tasks: Callable[[str, int, int, int], None],
        *,
        python: Path | None = None,
        conf: Path | None = None,
        timeout: float = 30.0,
        observer: Observer = lambda program, seconds, ok: None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._cancel_tasks = cancel_tasks
        self._argv = [str(python or sys.executable), "-I", str(Path(worker.__file__))]
        self._timeout = timeout
        self._observer = observer
        self._uid = os.getuid()
        outer = os.environ if environ is None else environ
        self._job_env = job_environment(DEFAULT_PATH, outer)
        self._env = {**program_environment(DEFAULT_PATH, outer, None, conf), "TZ": "UTC"}
        self._description: SiteDescription | None = None
        self._described = 0.0

    def submit(self, submission: Submission) -> int:
        """Call JobSubmitDescription(…).submit()."""
        request = {"do": "submit", "job": description(submission, self._job_env)}
        last = self._timeout + _ORPHAN_SECONDS
        with in_flight.guarded(submission.directory, last) as locks:
            guard = [shutil.which("timeout") or "timeout", "--signal=KILL", f"{last:g}"]
            try:
                result = self._run(request, self._env, guard, locks)
            except (CommandTimeout, CommandOutputTooLong) as error:
                raise SubmissionAmbiguous(f"pyslurm: {error}") from None
            except OSError as error:
                raise SubmissionRefused(f"pyslurm: {self._argv[0]}: {error.strerror}", Patience.QUEUE) from None
        return submitted(result)

    def submission_may_run(self, directory: Path) -> bool:
        """Return whether a worker from this directory still runs: it holds the lock that it inherited."""
        return in_flight.may_run(directory)

    def jobs(self, users: Collection[str] = ()) -> Sequence[TaskRecord]:
        """Call Jobs.load()."""
        return records(self._ask({"do": "jobs", "uid": self._uid}))

    def history(self, names: Sequence[str], since: float, user: str = "") -> Sequence[TaskRecord]:
        """Return nothing: the ends of finished jobs are known from their tasks' markers."""
        return []

    def cancel(self, name: str, array_id: int, first: int = 0, last: int | None = None, user: str = "") -> None:
        """Call Job(id).cancel() if name and owner match. pyslurm cannot cancel a part of an array: use scancel."""
        if last is not None:
            self._cancel_tasks(name, array_id, first, last)
            return
        self._ask({"do": "cancel", "name": name, "array": array_id, "uid": self._uid})

    def describe(self) -> SiteDescription:
        """Call slurmctld.Config.load(), at most once an hour."""
        if self._description is None or time.monotonic() > self._described + _DESCRIBE_AGAIN:
            answer = self._ask({"do": "describe"})
            try:
                self._description = SiteDescription(
                    str(answer["version"]), str(answer["cluster"]), accounting="", max_array_size=int(answer["arrays"])
                )
            except (KeyError, TypeError, ValueError):
                raise SlurmError("pyslurm: malformed answer") from None
            self._described = time.monotonic()
        return self._description

    def partitions(self) -> list[str]:
        """Call Partitions.load()."""
        return [str(name) for name in self._ask({"do": "partitions"})]

    def _ask(self, request: Mapping[str, Any]) -> Any:
        """Send an idempotent request and return its result. Raises :class:`SlurmError`."""
        # List waiting tasks in full. Not for submissions, since jobs would inherit the variable.
        env = {**self._env, "SLURM_BITSTR_LEN": "0"}
        try:
            result = self._run(request, env)
        except (CommandTimeout, CommandOutputTooLong) as error:
            raise SlurmError(f"pyslurm: {error}") from None
        except OSError as error:
            raise SlurmError(f"pyslurm: {self._argv[0]}: {error.strerror}") from None
        answer = _answer(result)
        if "result" not in answer:
            raise SlurmError(f"pyslurm: {request['do']}: {answer.get('refused') or _words(answer, result)}")
        return answer["result"]

    def _run(
        self,
        request: Mapping[str, Any],
        env: Mapping[str, str],
        guard: Sequence[str] = (),
        inherit: Sequence[int] = (),
    ) -> Result:
        began = time.monotonic()
        good = False
        try:
            result = run(
                [*guard, *self._argv, json.dumps(request)], env=env, timeout=self._timeout, max_output=_MAX_LISTING,
                inherit=inherit,
            )  # fmt: skip
            good = "result" in _answer(result)
            return result
        finally:
            self._observer(f"pyslurm {request['do']}", time.monotonic() - began, good)


def description(wanted: Submission, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of pyslurm's JobSubmitDescription."""
    job: dict[str, Any] = {
        "name": wanted.name,
        "script": str(wanted.script),
        "array": f"0-{wanted.tasks - 1}" + (f"%{wanted.at_once}" if wanted.at_once else ""),
        "comment": wanted.comment,
        "working_directory": str(wanted.directory),
        "standard_output": wanted.output,
        "standard_in": "/dev/null",
        "log_files_open_mode": "append",
        "is_requeueable": True,
        "nodes": 1,
        "ntasks": wanted.steps,
        "cpus_per_task": wanted.cpus_per_task,
        "time_limit": -(-wanted.time_limit_seconds // 60),
        "signal": {"signal": 15, "time": wanted.warning_seconds, "batch_only": wanted.steps == 1},
        # pyslurm's default would be its whole own environment.
        "environment": dict(environment),
    }
    if wanted.account:
        job["account"] = wanted.account
    if wanted.qos:
        job["qos"] = wanted.qos
    if wanted.partition:
        job["partitions"] = wanted.partition
    how, memory = wanted.memory
    if how != "none":
        job[f"memory_{how.replace('-', '_')}"] = f"{memory}M"
    asked, gpus = wanted.gpus
    # pyslurm has no option for GPUs per node; generic resources are equivalent.
    plain = wanted.gres if asked == "per-node" else wanted.plain_gres
    if plain:
        job["gres_per_node"] = ",".join(gres.words() for gres in plain)
    if asked in ("per-task", "per-job") and gpus:
        name = "gpus_per_task" if asked == "per-task" else "gpus"
        job[name] = ",".join(gres.words(named=False) for gres in gpus)
    return job | _options(wanted.options)


def _options(options: Options) -> dict[str, Any]:
    job = {
        "constraints": options.constraint,
        "reservations": options.reservation,
        "wckey": options.wckey,
        "licenses": options.licenses,
        "nice": options.nice,
        "threads_per_core": options.threads_per_core,
        "resource_sharing": {"": "", "yes": "no"}.get(options.exclusive, options.exclusive),
    }
    return {name: value for name, value in job.items() if value}


def submitted(result: Result) -> int:
    """Return the job id in the worker's answer. Raises :class:`SubmissionRefused` or :class:`SubmissionAmbiguous`."""
    answer = _answer(result)
    job = answer.get("result")
    if type(job) is int and job > 0:
        return job
    if isinstance(answer.get("refused"), str):
        raise SubmissionRefused(f"pyslurm: {answer['refused']}", Patience.QUEUE)
    words = _words(answer, result)
    error = answer.get("error")
    number = error[0] if isinstance(error, list) and error else -1
    judgement = submission_errors.of_slurm([words])
    # The error numbers of refusals by the controller.
    if type(number) is not int or not 2000 <= number < 3000 or judgement.sent is not submission_errors.Sent.REFUSED:
        raise SubmissionAmbiguous(f"pyslurm: {words}")
    raise SubmissionRefused(f"Slurm refused: {judgement.reason}", judgement.patience)


def records(listed: Any) -> list[TaskRecord]:
    """Return what the worker reports about the queue. Raises :class:`SlurmError`."""
    try:
        return [_record(job) for job in listed]
    except (KeyError, TypeError, ValueError):
        raise SlurmError("pyslurm: malformed answer") from None


def _record(job: Mapping[str, Any]) -> TaskRecord:
    state = normal(job["state"])
    waiting = job["waiting"]
    indices: tuple[int, ...] | None = None
    if waiting:
        indices = expand(waiting)
    elif job["array"] and (job["task"] or job["node"] or job["restarts"] or not meaning(state).over):
        # pyslurm returns no index for task 0, nor for tasks that were cancelled together before they started. The
        # latter are over and never had a node.
        indices = (int(job["task"] or 0),)
    return TaskRecord(
        job_id=int(job["id"]),
        array_id=int(job["array"] or job["id"]),
        name=str(job["name"]),
        indices=indices,
        state=state,
        reason="" if job["reason"] in _NOTHING else str(job["reason"]),
        exit_code=int(job["exit_code"]),
        signal=int(job["signal"]),
        restarts=int(job["restarts"]),
        start=float(job["start"]),
        submitted=float(job["submitted"]),
        node=str(job["node"]),
        ends=float(job["end"]) if state == "RUNNING" else 0.0,
        directory=str(job["directory"]),
    )


def _answer(result: Result) -> Mapping[str, Any]:
    try:
        answer = json.loads(result.output) if result.status == 0 else None
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {}


def _words(answer: Mapping[str, Any], result: Result) -> str:
    error = answer.get("error")
    if isinstance(error, list) and error:
        return " ".join(str(error[-1]).split())[:400]
    lines = [line.strip() for line in result.errors.splitlines() if line.strip()]
    return (lines[-1] if lines else f"the worker ended with status {result.status}")[:400]
