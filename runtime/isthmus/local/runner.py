"""Local run of one FederatedJob: the aggregator and all clients as processes, over gRPC with mutual TLS."""

import asyncio
import os
import signal
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from isthmus_contracts.manifests.manifest import FederatedJob
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.process import asyncio_tasks
from isthmus_contracts.text import one_line

from .aggregator_process import AggregatorProcess
from .certificates import client_directory, issue_certificates
from .child_process import ChildProcess
from .outcome import EXIT_COMPLETE, EXIT_FAILED, Interrupted, RunFailed, reason
from .plan import LocalClient, backoff, client_environment, inherited, local_clients, local_command
from .preflight import check_command
from .protection import InstanceFailures, introduction, result
from .roster import Roster, counted
from .round_records import RoundRecords
from .run_directory import RunDirectory
from .view import PoolView, Snapshot, View, format_metrics

# Grace periods after SIGTERM. After training the aggregator may still deliver metrics (see TRACKING_SECONDS in
# aggregator.__main__). Seconds.
_GRACE, _LAST_GRACE = 10.0, 40.0
_SHOWN_LINES = 12
# Time after which the user is advised what to do about clients that start slowly or hang. Seconds.
_ADVICE_SECONDS = 60.0


class LocalRun:
    """One run. ``await run()`` returns the exit code; by then all processes have ended."""

    def __init__(
        self, job: FederatedJob, uid: str, directory: RunDirectory, view: View, again: str, cwd: Path | None,
        finish_seconds: float,
    ) -> None:  # fmt: skip
        """``again``: the command that resumes the run, shown to the user. ``cwd``: working directory of all processes,
        by default the runner's. ``finish_seconds``: time for scripts to end once training is complete.
        """
        self._cwd = cwd
        self._job = job
        self._uid = uid
        self._directory = directory
        self._view = view
        self._again = again
        self._finish_seconds = finish_seconds
        self._clients = local_clients(job)
        self._children: dict[LocalClient, ChildProcess] = {}
        self._roster = Roster(job, self._clients)
        self._aggregator = AggregatorProcess(job, uid, directory, view, cwd)
        self._shown_failures: set[str] = set()
        self._warned: set[str] = set()
        self._instances = InstanceFailures()
        self._reported = directory.committed
        self._records = RoundRecords(directory.rounds_file, job.spec.objective, self._reported)
        self._status = pb.FederationStatus(completed_rounds=self._reported, total_rounds=job.spec.rounds)
        self._started = time.monotonic()
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._trained = asyncio.Event()
        self._hurry = asyncio.Event()
        self._begun = False  # a round has begun since this run started
        self._tasks: set[asyncio.Task[None]] = set()
        self._client_tasks: list[asyncio.Task[None]] = []
        self._deadline: asyncio.TimerHandle | None = None

    async def run(self) -> int:
        """Run until training is complete or has failed, or a signal arrives."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and shells for background jobs, ignore some
                loop.add_signal_handler(number, self._signalled, number)
        if limit := self._job.spec.active_deadline_seconds:
            overdue = f"not complete after activeDeadlineSeconds ({limit} s)"
            self._deadline = loop.call_later(limit, self._end, RunFailed(overdue))
        try:
            self._spawn_task(self._run())
            await self._outcome
            await self._stop()
            self._view.close()
            return self._complete()
        except RunFailed as error:
            await self._stop()
            self._view.close()
            self._view.warn(f"isthmus: {error}; the logs are in {self._directory.shown(self._directory.logs)}")
            return EXIT_FAILED
        except Interrupted as stop:
            running = [*self._running(), *([self._aggregator.child] if self._aggregator.running else [])]
            self._view.info(f"{stop}: stopping {counted(len(running), 'process')}")
            await self._stop()
            self._view.close()
            if self._trained.is_set():
                self._complete()
            else:
                done = self._directory.committed
                self._view.info(f"stopped after round {done} of {self._job.spec.rounds}; resume with: {self._again}")
            return 128 + stop.number
        finally:
            await self._stop()

    async def _stop(self) -> None:
        """End all tasks and processes: first the clients, which may still submit an update."""
        await asyncio_tasks.end(self._tasks)
        await asyncio.gather(*(child.stop(_GRACE, self._hurry) for child in self._children.values()))
        if self._aggregator.child is not None:
            await self._aggregator.child.stop(_LAST_GRACE if self._trained.is_set() else _GRACE, self._hurry)

    async def _run(self) -> None:
        spec, view = self._job.spec, self._view
        pools = ", ".join(f"{pool.name} {pool.replicas}" for pool in spec.pools)
        clients = counted(len(self._clients), "client")
        view.info(f"{self._job.name}: {counted(spec.rounds, 'round')} over {clients} ({pools})")
        for line in introduction(spec):
            view.info(line)
        if spec.suspend:
            view.info("spec.suspend is true: on a cluster this job would wait")
        if self._reported:
            view.info(f"resuming after round {self._reported} of {spec.rounds}")
        self._show("starting the aggregator")
        credentials = issue_certificates(self._job, self._uid, self._directory.tls)
        self._aggregator.wait_for(self._roster.expected)
        self._spawn_task(self._run_aggregator())
        await self._aggregator.listening.wait()
        self._spawn_task(self._aggregator.watch(credentials, self._follow))
        self._show(f"starting {clients}")
        self._client_tasks = [self._spawn_task(self._keep_client(client)) for client in self._clients]
        await asyncio.sleep(_ADVICE_SECONDS)
        if not self._begun:
            logs = self._directory.shown(self._directory.logs)
            for line in self._roster.advice(_connected(self._status), self._reported + 1, logs):
                view.info(line)

    async def _run_aggregator(self) -> None:
        await self._aggregator.keep()
        self._end_training()

    def _follow(self, status: pb.FederationStatus) -> None:
        self._begun = self._begun or status.phase not in (pb.FederationStatus.WAITING, pb.FederationStatus.INITIALIZING)
        first = status.phase == pb.FederationStatus.TRAINING and self._status.phase != status.phase
        if first and status.completed_rounds == self._reported:
            there = f"{_connected(status)} of {counted(len(self._clients), 'client')}"
            self._view.info(f"{there} connected after {self._elapsed():.1f} s")
        warnings = list(status.warnings)
        keeps = status.message not in ("", self._status.message, *warnings)
        if keeps and status.phase != pb.FederationStatus.WAITING:
            self._view.warn(one_line(status.message))
        for warning in warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                self._view.warn(one_line(warning))
        if failure := self._instances.news(status):
            self._view.warn(failure)
        if status.completed_rounds >= self._status.completed_rounds:
            # A restarted aggregator reports fewer rounds until it has read its checkpoint.
            self._status = status
        for done in self._records.follow(status):
            self._view.report_round(done)
        if status.phase == pb.FederationStatus.COMPLETE:
            self._end_training()
        self._show()
        self._check_quorum()

    def _end_training(self) -> None:
        if not self._trained.is_set():
            self._trained.set()
            if self._deadline is not None:
                self._deadline.cancel()
            self._spawn_task(self._finish())

    async def _finish(self) -> None:
        """Wait for the scripts to end, up to the limit. The aggregator stays for late ones."""
        await asyncio.wait(self._client_tasks, timeout=self._finish_seconds)
        late = [client.name for client, child in self._children.items() if child.running]
        if late:
            after = f"{self._finish_seconds:g} s after training was complete (--finish-seconds)"
            self._view.warn(f"{', '.join(late)}: stopped, as the script still ran {after}")
        self._end(None)

    # ---- the clients

    async def _keep_client(self, client: LocalClient) -> None:
        """Run a client, and restart it after failures, within the job's backoffLimit."""
        limit = self._job.spec.backoff_limit
        log = self._directory.logs / f"{client.name}.log"
        tls = client_directory(self._directory.tls, client.pool, client.index)
        command = local_command(self._job.spec.task.command)
        for attempt in range(limit + 1):
            environment = client_environment(
                os.environ,
                self._job,
                self._uid,
                client,
                attempt,
                self._aggregator.endpoint,
                tls,
                self._directory.scratch,
            )
            child = await ChildProcess.spawn(command, environment, log, self._cwd)
            self._children[client] = child
            self._show()
            code = await child.wait()
            if code == 0:
                self._roster.left.add(client)
                break
            self._report_failure(client, child.last_lines(_SHOWN_LINES), reason(code), log)
            if self._trained.is_set():
                break
            if code > 0 and self._fail_if_common(client, child.last_lines(1)):
                return
            if attempt == limit:
                self._roster.failed.add(client)
                self._view.warn(f"{client.name} is given up: it failed {counted(limit + 1, 'time')}")
                break
            delay = backoff(attempt + 1)
            self._view.warn(f"{client.name} starts again in {delay:.0f} s (attempt {attempt + 1} of {limit})")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._trained.wait(), delay)
            if self._trained.is_set():  # the client is no longer needed
                break
        self._aggregator.wait_for(self._roster.expected)
        self._show()
        self._check_quorum()

    def _report_failure(self, client: LocalClient, lines: list[str], how: str, log: Path) -> None:
        """Print the end of a failed client's log; after the first such failure, only its last line."""
        last = lines[-1] if lines else ""
        self._roster.note_failure(client, last or how)
        if last in self._shown_failures:
            lines = [f"as before: {last}"]
        self._shown_failures.add(last)
        when = " after training was complete" if self._trained.is_set() else ""
        shown = self._directory.shown(log)
        self._view.warn("\n".join([f"{client.name} failed{when} ({how}), {shown}:", *(f"  {line}" for line in lines)]))

    def _fail_if_common(self, client: LocalClient, lines: list[str]) -> bool:
        """Fail the run if every client has failed with the same error before a round was complete."""
        begun = self._status.completed_rounds > self._reported
        if begun or not lines or not (cause := self._roster.common_failure):
            return False
        who = "every client" if len(self._clients) > 1 else client.name
        self._end(RunFailed(f"{who} failed at its start: {cause}"))
        return True

    def _running(self) -> list[ChildProcess]:
        return [child for child in self._children.values() if child.running]

    def _check_quorum(self) -> None:
        """Fail the run if too few clients are left for it to complete."""
        if self._trained.is_set():
            return
        if shortage := self._roster.shortage(self._status.phase):
            self._end(RunFailed(shortage))

    # ---- output

    def _show(self, activity: str = "") -> None:
        spec, status = self._job.spec, self._status
        seen = {pool.name: pool for pool in status.pools}
        pools = []
        for pool in spec.pools:
            members = [client for client in self._clients if client.pool == pool.name]
            running = sum(client in self._children and self._children[client].running for client in members)
            connected = seen[pool.name].connected if pool.name in seen else 0
            failed = sum(client in self._roster.failed for client in members)
            kind = "cloud" if pool.cloud is not None else "hpc"
            pools.append(PoolView(pool.name, kind, pool.replicas, running, connected, failed))
        self._view.show(Snapshot(activity or self._activity(), status.completed_rounds, spec.rounds, pools))

    def _activity(self) -> str:
        clients = counted(len(self._clients), "client")
        match self._status.phase:
            case pb.FederationStatus.TRAINING:
                return "training"
            case pb.FederationStatus.EVALUATING:
                return "evaluating the final model"
            case pb.FederationStatus.COMPLETE:
                return "training is complete; waiting for the scripts to end"
            case pb.FederationStatus.INITIALIZING:
                return "waiting for the initial weights"
            case _:
                connected = _connected(self._status)
                return f"{connected} of {clients} connected" if connected else f"starting {clients}"

    def _complete(self) -> int:
        status, objective = self._status, self._job.spec.objective
        best, rounds = status.best, status.completed_rounds or self._job.spec.rounds
        met = f"; {objective.metric} met its target, {objective.target}" if status.target_round else ""
        self._view.info(f"complete: {counted(rounds, 'round')} in {self._elapsed():.1f} s{met}")
        if best.name:
            self._view.info(f"best {format_metrics({best.name: best.value})[0]} (round {best.round})")
        if self._status.HasField("privacy"):
            privacy = self._status.privacy
            ended = f"; another round would pass maxEpsilon {privacy.max_epsilon:g}" if privacy.spent else ""
            self._view.info(f"privacy: epsilon {privacy.epsilon:.4g} (delta {privacy.delta:g}){ended}")
        if line := result(status):
            self._view.info(line)
        of_round = f" (round {status.model.round})" if status.HasField("model") else ""
        self._view.info(f"model: {self._directory.shown(self._directory.model)}{of_round}")
        if status.HasField("best_model") and status.best_model.round != status.model.round:
            self._view.info(
                f"best model: {self._directory.shown(self._directory.best_model)} (round {status.best_model.round})"
            )
        return EXIT_COMPLETE

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    # ---- end of the run

    def _end(self, error: BaseException | None) -> None:
        if self._outcome.done():
            return
        if error is None:
            self._outcome.set_result(None)
        else:
            self._outcome.set_exception(error)

    def _signalled(self, number: signal.Signals) -> None:
        if self._outcome.done():
            self._hurry.set()  # a second signal: kill immediately
        self._end(Interrupted(number))

    def _spawn_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end(error)


def _connected(status: pb.FederationStatus) -> int:
    return sum(pool.connected for pool in status.pools)


def run_job(
    job: FederatedJob,
    root: Path,
    view: View,
    *,
    manifest: Path,
    code: Mapping[str, bytes],
    resume: bool,
    overwrite: bool,
    again: str,
    finish_seconds: float,
) -> int:
    """Run a job in the directory ``root``; return the exit code. ``code``: the files of task.code.

    Raises :class:`RunDirectoryError`, and :class:`.preflight.CommandError`.
    """
    directory = RunDirectory(root)
    path = {"PATH": inherited(os.environ)["PATH"], **{v.name: v.value for v in job.spec.task.env}}["PATH"]
    where = directory.code if code else Path.cwd()
    check_command(local_command(job.spec.task.command), path, where, manifest.parent, code or None)
    with directory.opened(job, resume=resume, overwrite=overwrite) as uid:
        if directory.finished(job.spec.rounds):
            view.info(f"{job.name}: all {job.spec.rounds} rounds are already done")
            view.info(f"model: {directory.shown(directory.model)}")
            return EXIT_COMPLETE

        async def run() -> int:
            return await LocalRun(
                job, uid, directory, view, again, directory.write_code(code), finish_seconds
            ).run()  # fmt: skip

        return asyncio.run(run())
