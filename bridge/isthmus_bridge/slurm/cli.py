"""The adapter that runs Slurm's own programs: sbatch, squeue, sacct, scancel, scontrol. For Slurm 22.05 and newer."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from . import in_flight, options, parse, submission_errors
from .command import CommandOutputTooLong, CommandTimeout, Result, Runner, run
from .environment import DEFAULT_PATH, program_environment
from .model import (
    Patience,
    SiteDescription,
    SlurmError,
    Submission,
    SubmissionAmbiguous,
    SubmissionRefused,
    TaskRecord,
)
from .run_as import AsUserError, Delegate
from .unix_users import uid_of

# Limit of a program's output in bytes; a queue of a hundred thousand tasks is far below it.
_MAX_LISTING = 64 << 20
# Additional time for an sbatch whose bridge has died. Seconds.
_ORPHAN_SECONDS = 2.0
# The description is read again after this time, since Slurm may be upgraded while the bridge runs. Seconds.
_DESCRIBE_AGAIN = 3600.0
_QUERY = {
    "LC_ALL": "C",
    "TZ": "UTC",
    "SLURM_TIME_FORMAT": "%s",
    "SLURM_BITSTR_LEN": "0",  # write lists of task indices in full
}

_MEMORY = {"per-node": "--mem", "per-cpu": "--mem-per-cpu", "per-gpu": "--mem-per-gpu"}
_GPUS = {"per-task": "--gpus-per-task", "per-node": "--gpus-per-node", "per-job": "--gpus"}

# With --parsable sbatch prints the id, or the id and the cluster; wrappers at some sites drop --parsable.
_ANSWER = re.compile(r"(\d+)(?:;(.*))?|Submitted batch job (\d+)(?: on cluster (.+))?", re.ASCII)

# The arguments of sbatch that depend on a site's policy.
OWN_ARGUMENTS = (
    "--partition", "--account", "--qos", "--mem", "--gres", "--gpus", "--constraint", "--reservation", "--exclusive",
    "--wckey", "--licenses", "--hint", "--switches", "--nodelist", "--exclude", "--nice", "--threads-per-core", "--tmp",
)  # fmt: skip

Observer = Callable[[str, float, bool], None]


def arguments(submission: Submission) -> list[str]:
    """Return sbatch's arguments. Every value follows its option's `=`, so that none can be taken for an option."""
    minutes = -(-submission.time_limit_seconds // 60)
    listed = [
        "--parsable",
        f"--job-name={submission.name}",
        f"--array=0-{submission.tasks - 1}" + (f"%{submission.at_once}" if submission.at_once else ""),
        f"--comment={submission.comment}",
        f"--chdir={submission.directory}",
        f"--output={submission.output}",
        "--open-mode=append",  # a requeued task must not overwrite the log of its earlier start
        "--input=none",
        # Export the whole environment of sbatch, which the bridge has made. With NONE or a list of names, Slurm would
        # add the user's login environment, and NIL needs 23.02.
        "--export=ALL",
        "--propagate=NONE",
        "--requeue",
        "--nodes=1",
        f"--ntasks={submission.steps}",
        f"--cpus-per-task={submission.cpus_per_task}",
        f"--time={minutes}",
        f"--signal={'B:' if submission.steps == 1 else ''}TERM@{submission.warning_seconds}",
    ]
    how, memory = submission.memory
    if how != "none":
        listed.append(f"{_MEMORY[how]}={memory}M")
    if submission.partition:
        listed.append(f"--partition={submission.partition}")
    if submission.account:
        listed.append(f"--account={submission.account}")
    if submission.qos:
        listed.append(f"--qos={submission.qos}")
    if submission.plain_gres:
        listed.append("--gres=" + ",".join(gres.words() for gres in submission.plain_gres))
    wanted, gpus = submission.gpus
    if wanted != "gres" and gpus:
        listed.append(f"{_GPUS[wanted]}=" + ",".join(gres.words(named=False) for gres in gpus))
    return [*listed, *options.arguments(submission.options), str(submission.script)]


def cancellation(uid: int, name: str, array_id: int, first: int, last: int | None) -> list[str]:
    """Return the command line of scancel. It states name and user too, since Slurm may reuse an id after a crash."""
    which = str(array_id) if last is None else f"{array_id}_[{first}-{last}]"
    # A changed name may be longer than the width that squeue was set to show.
    condition = [f"--name={name}"] if len(name) < parse.NAME_WIDTH else []
    return ["scancel", f"--user={uid}", *condition, which]


class CliAdapter:
    """The :class:`~.model.SlurmAdapter` that runs Slurm's programs."""

    def __init__(
        self,
        *,
        bin_dir: Path | None = None,
        conf: Path | None = None,
        timeout: float = 30.0,
        runner: Runner = run,
        observer: Observer = lambda program, seconds, ok: None,
        environ: Mapping[str, str] | None = None,
        delegate: Delegate | None = None,
        operator: bool = False,
    ) -> None:
        """``delegate``: runs programs as other users. ``operator``: Slurm shows this user the jobs of all users."""
        self._delegate = delegate
        self._operator = operator
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
        """Run sbatch."""
        return self._submit_as_user(submission) if submission.user else self._submit(submission)

    def _submit(self, submission: Submission) -> int:
        last = self._timeout + _ORPHAN_SECONDS
        with in_flight.guarded(submission.directory, last) as locks:
            try:
                # Slurm makes the job's environment from this one, which holds nothing of the bridge's environment.
                # `timeout` ends sbatch even if this process has died.
                guard = [which("timeout", self._query_env["PATH"]), "--signal=KILL", f"{last:g}"]
                argv = ["sbatch", *arguments(submission)]
                result = self._run(argv, env=self._submit_env, inherit=locks, guard=guard)
            except CommandTimeout as error:
                raise out_of_time(error.errors) from None
            except CommandOutputTooLong as error:
                raise SubmissionAmbiguous(str(error)) from None
            except OSError as error:
                # The program did not start.
                raise SubmissionRefused(f"sbatch: {error.strerror}", Patience.QUEUE) from None
        return self._check_cluster(submitted(result), result, submission)

    def _check_cluster(self, job: int, result: Result, submission: Submission) -> int:
        """Return the job if it is on the cluster that the adapter observes.

        If SLURM_CLUSTERS or a plug-in of the site has sent it to another cluster, cancel it, since the bridge cannot
        observe it there, and raise :class:`SubmissionRefused`.
        """
        cluster = cluster_of(result)
        try:
            own = self.describe().cluster if cluster else ""
        except SlurmError:
            return job
        if not cluster or not own or cluster == own:
            return job
        message = f"sbatch sent it to the cluster {cluster!r} as job {job}, but this bridge observes {own!r}"
        if submission.user:
            raise SubmissionRefused(f"{message}; cancel it by hand")
        _, *rest = cancellation(self._uid, submission.name, job, 0, None)
        try:
            self._ask(["scancel", f"--clusters={cluster}", *rest], accept=frozenset({0, 1}))
        except SlurmError as error:
            raise SubmissionRefused(f"{message}; it could not be cancelled: {error}") from None
        raise SubmissionRefused(f"{message}; it was cancelled")

    def _submit_as_user(self, submission: Submission) -> int:
        # sudo passes no descriptors on, so a lock cannot be inherited: record the time by which the submission is over,
        # as for a request over the network. Another user's process cannot be killed, so it ends itself by then.
        guard = submission.guard or submission.directory
        try:
            in_flight.announce(guard, self._timeout + _ORPHAN_SECONDS)
        except OSError as error:
            raise SubmissionRefused(f"cannot write in {guard}: {error.strerror}", Patience.QUEUE) from None
        began, good = time.monotonic(), False
        try:
            result = self._checked_delegate().submit(submission, time.time() + self._timeout)
            good = result.status == 0
        except AsUserError as error:
            if error.begun:
                raise out_of_time(error.errors, f"{error.strerror}") from None
            in_flight.settle(guard)
            raise SubmissionRefused(f"{error.strerror}", Patience.QUEUE) from None
        finally:
            self._observer("sbatch", time.monotonic() - began, good)
        in_flight.settle(guard)
        return self._check_cluster(submitted(result), result, submission)

    def _checked_delegate(self) -> Delegate:
        if self._delegate is None:
            raise AsUserError("the policy has no settings `users`")
        return self._delegate

    def submission_may_run(self, directory: Path) -> bool:
        """Return whether an sbatch from this directory may still run: it holds its lock, or started recently."""
        return in_flight.may_run(directory)

    def jobs(self, users: Collection[str] = ()) -> Sequence[TaskRecord]:
        """Run squeue, once for all users."""
        owners = {self._uid: ""}
        if users:
            self._must_see(self.describe())
            owners |= {self._uid_of(user): user for user in users}
        listed = ",".join(map(str, owners))
        argv = ["squeue", "--noheader", "--all", "--local", "--states=all", f"--user={listed}"]
        separator = parse.new_separator()
        # In the environment, since every user of this machine can read arguments.
        env = {**self._query_env, "SQUEUE_FORMAT2": parse.squeue_format(separator)}
        return parse.squeue(self._ask(argv, env=env), separator, owners)

    def _uid_of(self, user: str) -> int:
        uid = uid_of(user)
        if uid is None:
            raise SlurmError(f"the local user {user} is not known on this machine")
        return uid

    def _must_see(self, description: SiteDescription) -> None:
        """Raise :class:`SlurmError` if Slurm hides other users' jobs: a missing job then may not have ended."""
        if description.private_jobs and not self._operator:
            raise SlurmError(
                "slurm.conf's PrivateData hides other users' jobs; make the bridge's user an operator of Slurm"
                " (sacctmgr modify user ... set adminlevel=operator), and set users.operator: true in the policy"
            )

    def history(self, names: Sequence[str], since: float, user: str = "") -> Sequence[TaskRecord]:
        """Run sacct."""
        uid = self._uid_of(user) if user else self._uid
        if user:
            # The caller misses jobs, so an hour-old value of PrivateData is not good enough.
            self._described = 0.0
            self._description = None
            self._must_see(self.describe())
        accounting = self.describe().accounting
        if not accounting:
            return []
        separator = parse.new_separator()
        argv = [*accounting.split(), "--noheader", "--parsable", f"--delimiter={separator}", "--allocations"]
        argv += [f"--format={parse.SACCT_FORMAT}", f"--user={uid}", f"--name={','.join(names)}"]
        # Start a day early, for clocks that disagree. TZ is UTC.
        argv.append("--starttime=" + time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(max(0.0, since - 86400))))
        return parse.sacct(self._ask(argv), separator, frozenset(names), uid, user)

    def cancel(self, name: str, array_id: int, first: int = 0, last: int | None = None, user: str = "") -> None:
        """Run scancel."""
        # The exit code is also 1 if the job is over. squeue shows whether the job ends.
        accepted = frozenset({0, 1})
        if not user:
            self._ask(cancellation(self._uid, name, array_id, first, last), accept=accepted)
            return
        try:
            result = self._checked_delegate().cancel(user, name, array_id, first, last)
        except AsUserError as error:
            raise SlurmError(f"{error.strerror}") from None
        if result.status not in accepted:
            raise SlurmError(f"scancel failed: {last_line(result.errors) or f'exit code {result.status}'}")

    def describe(self) -> SiteDescription:
        """Run scontrol, at most once an hour."""
        if self._description is None or time.monotonic() > self._described + _DESCRIBE_AGAIN:
            settings = dict(_settings(self._ask(["scontrol", "show", "config"])))
            self._description = SiteDescription(
                version=settings.get("SLURM_VERSION", ""),
                cluster=settings.get("ClusterName", ""),
                accounting=self._accounting(settings),
                max_array_size=int(settings.get("MaxArraySize", "1001")),
                private_jobs="jobs" in settings.get("PrivateData", "").split(","),
            )
            self._described = time.monotonic()
        return self._description

    def partitions(self) -> list[str]:
        """Run sinfo, and return the names of the partitions."""
        return sorted(set(self._ask(["sinfo", "--noheader", "--all", "--format=%R"]).split()))

    def _accounting(self, settings: Mapping[str, str]) -> str:
        if settings.get("AccountingStorageType", "").endswith("slurmdbd"):
            return "sacct"
        if settings.get("JobCompType", "").endswith("filetxt"):
            # At many sites only the Slurm user may read that file.
            with contextlib.suppress(SlurmError):
                self._ask(["sacct", "-c", "--noheader", "--parsable2", "--format=JobID"])
                return "sacct -c"
        return ""

    def _ask(
        self, argv: list[str], accept: frozenset[int] = frozenset({0}), env: Mapping[str, str] | None = None
    ) -> str:
        """Run an idempotent program and return its output. Raises :class:`SlurmError`."""
        try:
            result = self._run(argv, env=env)
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
            path = which(program, self._query_env["PATH"])
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
    """Return the job id in sbatch's result. Raises :class:`SubmissionRefused` or :class:`SubmissionAmbiguous`."""
    if result.status == 0:
        if len(ids := {job for job, _ in _answers(result.output)}) == 1:
            return ids.pop()
        raise SubmissionAmbiguous(f"sbatch answered {result.output[:120]!r} instead of a job id")
    judgement = submission_errors.of_sbatch(result.errors)
    # Only a clear refusal counts as one. After a signal, a wrapper's error or a broken connection it is unknown.
    if result.status < 0 or judgement.sent is not submission_errors.Sent.REFUSED:
        reason = judgement.reason or last_line(result.errors) or f"exit code {result.status}"
        raise SubmissionAmbiguous(f"sbatch failed: {reason}", waiting=judgement.sent is submission_errors.Sent.WAITING)
    raise SubmissionRefused(f"Slurm refused: {judgement.reason}", judgement.patience)


def cluster_of(result: Result) -> str:
    """Return the cluster that sbatch names after the job's id; empty if it names none."""
    named = (cluster for _, cluster in _answers(result.output))
    return next((name for name in named if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name)), "")


def _answers(output: str) -> Iterator[tuple[int, str]]:
    """Yield job and cluster (may be empty) of each line that is sbatch's answer; wrappers at sites add other lines."""
    for line in output.splitlines():
        if match := _ANSWER.fullmatch(line.strip()):
            yield int(match[1] or match[3]), (match[2] or match[4] or "").strip()


def out_of_time(errors: str, message: str = "sbatch did not answer in time") -> SubmissionAmbiguous:
    """Return the error for an sbatch that was killed at its time limit. ``errors``: its output on standard error."""
    judgement = submission_errors.of_sbatch(errors)
    if judgement.sent is submission_errors.Sent.WAITING:
        return SubmissionAmbiguous(f"Slurm has no room for it: {judgement.reason}", waiting=True)
    return SubmissionAmbiguous(f"{message}: {judgement.reason}" if judgement.reason else message)


def last_line(text: str) -> str:
    """Return the last line that is not blank, shortened; empty if there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:400] if lines else ""


def _settings(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, equals, value = line.partition(" = ")
        if equals:
            yield name.strip(), value.strip()


def which(program: str, path: str) -> str:
    """Return a program's path. Raises ``OSError`` if it is not found."""
    for directory in path.split(":"):
        candidate = Path(directory or ".") / program
        if os.access(candidate, os.X_OK) and candidate.is_file():
            return str(candidate)
    raise FileNotFoundError(2, "not found in PATH", program)
