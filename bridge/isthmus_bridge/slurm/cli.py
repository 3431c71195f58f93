"""The adapter that runs Slurm's own programs: sbatch, squeue, sacct, scancel, scontrol. For Slurm 22.05 and newer."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from . import in_flight, parse, refusal
from .command import CommandOutputTooLong, CommandTimeout, Result, Runner, run
from .environment import DEFAULT_PATH, program_environment
from .model import SiteDescription, SlurmError, Submission, SubmissionAmbiguous, SubmissionRefused, TaskRecord

# A site with a hundred thousand tasks in the queue stays far below this.
_MAX_LISTING = 64 << 20
# An sbatch whose bridge has died gets this much longer than one whose bridge lives.
_ORPHAN_SECONDS = 2.0
# A site is upgraded while the bridge runs.
_DESCRIBE_AGAIN = 3600.0
_QUERY = {
    "LC_ALL": "C",
    "TZ": "UTC",
    "SLURM_TIME_FORMAT": "%s",
    "SLURM_BITSTR_LEN": "0",  # write lists of task indices in full
}

# Slurm's own no; before it, sbatch's about its arguments and files.
_REFUSED = (
    re.compile(r"Batch job submission failed: *(.*)"),
    re.compile(r"^sbatch: (?:fatal|error): (.*)$", re.MULTILINE),
)

Observer = Callable[[str, float, bool], None]


def arguments(submission: Submission) -> list[str]:
    """sbatch's arguments. Every value stands behind its option's `=`, so none can pass for an option."""
    minutes = -(-submission.time_limit_seconds // 60)
    listed = [
        "--parsable",
        f"--job-name={submission.name}",
        f"--array=0-{submission.tasks - 1}" + (f"%{submission.at_once}" if submission.at_once else ""),
        f"--comment={submission.comment}",
        f"--chdir={submission.directory}",
        f"--output={submission.output}",
        "--open-mode=append",  # a requeued task must not wipe out why it was requeued
        "--input=none",
        # All of sbatch's own environment, which is the short one that we made. NONE or a list of names would make
        # Slurm add the user's login environment, and NIL needs 23.02.
        "--export=ALL",
        "--propagate=NONE",
        "--requeue",
        "--nodes=1",
        f"--ntasks={submission.steps}",
        f"--cpus-per-task={submission.cpus_per_task}",
        f"--mem={submission.memory_mib}M",
        f"--time={minutes}",
        f"--signal={'B:' if submission.steps == 1 else ''}TERM@{submission.warning_seconds}",
        f"--partition={submission.partition}",
    ]
    if submission.account:
        listed.append(f"--account={submission.account}")
    if submission.qos:
        listed.append(f"--qos={submission.qos}")
    if submission.gres:
        listed.append(
            "--gres=" + ",".join(":".join(filter(None, (g.name, g.type, str(g.count)))) for g in submission.gres)
        )
    return [*listed, str(submission.script)]


class CliAdapter:
    """See :class:`~.model.SlurmAdapter`."""

    def __init__(
        self,
        prefix: str,
        *,
        bin_dir: Path | None = None,
        conf: Path | None = None,
        timeout: float = 30.0,
        runner: Runner = run,
        observer: Observer = lambda program, seconds, ok: None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._prefix = prefix
        self._timeout = timeout
        self._runner = runner
        self._observer = observer
        self._uid = os.getuid()
        outer = os.environ if environ is None else environ
        self._submit_env = program_environment(DEFAULT_PATH, outer, bin_dir, conf)
        self._query_env = {**program_environment(outer.get("PATH", DEFAULT_PATH), outer, bin_dir, conf), **_QUERY}
        self._description: SiteDescription | None = None
        self._described = 0.0

    def submit(self, submission: Submission) -> int:
        """Runs sbatch."""
        with in_flight.locked(submission.directory) as lock:
            try:
                # Slurm makes the job's environment from this one: nothing of the bridge's own is in it.
                # `timeout` ends it also where this process is dead by then.
                last = f"{self._timeout + _ORPHAN_SECONDS:g}"
                guard = [_which("timeout", self._query_env["PATH"]), "--signal=KILL", last]
                argv = ["sbatch", *arguments(submission)]
                result = self._run(argv, env=self._submit_env, inherit=[lock], guard=guard)
            except (CommandTimeout, CommandOutputTooLong) as error:
                raise SubmissionAmbiguous(str(error)) from None
            except OSError as error:
                # The program was never started.
                raise SubmissionRefused(f"sbatch: {error.strerror}", transient=True) from None
        return submitted(result)

    def submission_may_run(self, directory: Path) -> bool:
        """Whether an sbatch from this directory still lives: it holds the lock that it inherited."""
        return in_flight.may_run(directory)

    def jobs(self) -> Sequence[TaskRecord]:
        """Runs squeue, once for everything."""
        argv = ["squeue", "--noheader", "--all", "--local", "--states=all", f"--user={self._uid}"]
        return parse.squeue(self._ask([*argv, f"--Format={parse.SQUEUE_FORMAT}"]), self._prefix)

    def history(self, names: Sequence[str], since: float) -> Sequence[TaskRecord]:
        """Runs sacct."""
        accounting = self.describe().accounting
        if not accounting:
            return []
        argv = [*accounting.split(), "--noheader", "--parsable2", f"--delimiter={parse.SEPARATOR}", "--allocations"]
        argv += [f"--format={parse.SACCT_FORMAT}", f"--user={self._uid}", f"--name={','.join(names)}"]
        # A day earlier than needed, for clocks that disagree. TZ is UTC.
        argv.append("--starttime=" + time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(max(0.0, since - 86400))))
        return parse.sacct(self._ask(argv), frozenset(names), self._uid)

    def cancel(self, name: str, array_id: int, first: int = 0, last: int | None = None) -> None:
        """Runs scancel. The name is a second condition: after a crash Slurm gives an id to another job."""
        which = str(array_id) if last is None else f"{array_id}_[{first}-{last}]"
        # Its exit code says little: 1 also when the job is over. Whether the job ends shows in squeue.
        self._ask(["scancel", f"--user={self._uid}", f"--name={name}", which], accept=frozenset({0, 1}))

    def describe(self) -> SiteDescription:
        """Runs scontrol, once an hour."""
        if self._description is None or time.monotonic() > self._described + _DESCRIBE_AGAIN:
            settings = dict(_settings(self._ask(["scontrol", "show", "config"])))
            self._description = SiteDescription(
                version=settings.get("SLURM_VERSION", ""),
                cluster=settings.get("ClusterName", ""),
                accounting=self._accounting(settings),
                max_array_size=int(settings.get("MaxArraySize", "1001")),
            )
            self._described = time.monotonic()
        return self._description

    def partitions(self) -> list[str]:
        """Names of the partitions. Runs sinfo."""
        return sorted(set(self._ask(["sinfo", "--noheader", "--all", "--format=%R"]).split()))

    def _accounting(self, settings: Mapping[str, str]) -> str:
        if settings.get("AccountingStorageType", "").endswith("slurmdbd"):
            return "sacct"
        if settings.get("JobCompType", "").endswith("filetxt"):
            # Often only Slurm's own user may read that file.
            with contextlib.suppress(SlurmError):
                self._ask(["sacct", "-c", "--noheader", "--parsable2", "--format=JobID"])
                return "sacct -c"
        return ""

    def _ask(self, argv: list[str], accept: frozenset[int] = frozenset({0})) -> str:
        """Output of a program that changes nothing by being run twice. Raises :class:`SlurmError`."""
        try:
            result = self._run(argv)
        except (CommandTimeout, CommandOutputTooLong) as error:
            raise SlurmError(str(error)) from None
        except OSError as error:
            raise SlurmError(f"{argv[0]}: {error.strerror}") from None
        if result.status not in accept:
            raise SlurmError(f"{argv[0]} failed: {last_line(result.errors) or f'exit code {result.status}'}")
        return result.output

    def _run(
        self,
        argv: list[str],
        env: Mapping[str, str] | None = None,
        inherit: Sequence[int] = (),
        guard: Sequence[str] = (),
    ) -> Result:
        began = time.monotonic()
        good = False
        try:
            program, *rest = argv
            path = _which(program, self._query_env["PATH"])
            result = self._runner(
                [*guard, path, *rest],
                env=env or self._query_env,
                timeout=self._timeout,
                max_output=_MAX_LISTING,
                inherit=inherit,
            )
            good = result.status == 0
            return result
        finally:
            self._observer(argv[0], time.monotonic() - began, good)


def submitted(result: Result) -> int:
    """The job id from sbatch's result. Raises :class:`SubmissionRefused` or :class:`SubmissionAmbiguous`."""
    if result.status == 0:
        # With --parsable: the id, or the id and the cluster's name.
        words = [line.partition(";")[0].strip() for line in result.output.splitlines()]
        ids = [word for word in words if word.isdecimal()]
        if len(ids) == 1:
            return int(ids[0])
        raise SubmissionAmbiguous(f"sbatch answered {result.output[:120]!r} instead of a job id")
    message = last_line(result.errors)
    match = next((found for pattern in _REFUSED if (found := pattern.search(result.errors))), None)
    # Only Slurm's own clear no counts as one; a signal, a wrapper's error or a broken connection leaves it open.
    if match is None or result.status < 0 or refusal.ambiguous(result.errors):
        raise SubmissionAmbiguous(f"sbatch failed: {message or f'exit code {result.status}'}")
    why = match[1].strip()[:400] or message
    raise SubmissionRefused(f"Slurm refused: {why}", transient=refusal.transient(message, result.errors))


def last_line(text: str) -> str:
    """The last line with content, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:400] if lines else ""


def _settings(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, equals, value = line.partition(" = ")
        if equals:
            yield name.strip(), value.strip()


def _which(program: str, path: str) -> str:
    for directory in path.split(":"):
        candidate = Path(directory or ".") / program
        if os.access(candidate, os.X_OK) and candidate.is_file():
            return str(candidate)
    raise FileNotFoundError(2, "not found in PATH", program)
