"""Runs one FederatedJob on this machine: an aggregator and every client as processes, over gRPC with mutual TLS."""

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

from .certificates import client_directory, issue_certificates
from .outcome import EXIT_COMPLETE, EXIT_FAILED, Interrupted, RunFailed, reason
from .plan import LocalClient, backoff, client_environment, inherited, local_clients, local_command
from .preflight import check_command
from .process import Child
from .roster import Roster, counted
from .rounds import RoundBook
from .run_directory import RunDirectory
from .server import Server
from .view import PoolView, Snapshot, View, format_metrics

# How long a process that is told to stop may take; the aggregator after training, which may have metrics to deliver
# (see aggregator.__main__.TRACKING_SECONDS). Seconds.
_GRACE, _LAST_GRACE = 10.0, 40.0
_SHOWN_LINES = 12
# After so long a wait for clients that start slowly, or hang, the user hears what to do. Seconds.
_PATIENCE = 60.0


class LocalRun:
    """One run. ``await run()`` returns the exit code, and by then every process is gone."""

    def __init__(
        self, job: FederatedJob, uid: str, directory: RunDirectory, view: View, again: str, cwd: Path | None,
        finish_seconds: float,
    ) -> None:  # fmt: skip
        """``again``: the command that goes on with the run, for the user to read. ``cwd``: of every process, if not
        ours. ``finish_seconds``: how long scripts may go on when training is complete."""
        self._cwd = cwd
        self._job = job
        self._uid = uid
        self._directory = directory
        self._view = view
        self._again = again
        self._finish_seconds = finish_seconds
        self._clients = local_clients(job)
        self._children: dict[LocalClient, Child] = {}
        self._roster = Roster(job, self._clients)
        self._server = Server(job, uid, directory, view, cwd)
        self._shown_failures: set[str] = set()
        self._warned: set[str] = set()
        self._told = directory.committed
        self._book = RoundBook(directory.rounds_file, job.spec.objective, self._told)
        self._status = pb.FederationStatus(completed_rounds=self._told, total_rounds=job.spec.rounds)
        self._started = time.monotonic()
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._trained = asyncio.Event()
        self._hurry = asyncio.Event()
        self._begun = False  # a round, since this run started
        self._tasks: set[asyncio.Task[None]] = set()
        self._client_tasks: list[asyncio.Task[None]] = []
        self._deadline: asyncio.TimerHandle | None = None

    async def run(self) -> int:
        """Runs until training is complete, has failed, or a signal arrives."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup, or a shell in the background, has set it
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
            running = [*self._running(), *([self._server.child] if self._server.running else [])]
            self._view.tell(f"{stop}: stopping {counted(len(running), 'process')}")
            await self._stop()
            self._view.close()
            if self._trained.is_set():
                self._complete()
            else:
                done = self._directory.committed
                self._view.tell(f"stopped after round {done} of {self._job.spec.rounds}; go on with: {self._again}")
            return 128 + stop.number
        finally:
            await self._stop()

    async def _stop(self) -> None:
        """Ends every task and every process: the clients first, which may still hand something in."""
        await asyncio_tasks.end(self._tasks)
        await asyncio.gather(*(child.stop(_GRACE, self._hurry) for child in self._children.values()))
        if self._server.child is not None:
            await self._server.child.stop(_LAST_GRACE if self._trained.is_set() else _GRACE, self._hurry)

    async def _run(self) -> None:
        spec, view = self._job.spec, self._view
        pools = ", ".join(f"{pool.name} {pool.replicas}" for pool in spec.pools)
        clients = counted(len(self._clients), "client")
        view.tell(f"{self._job.name}: {counted(spec.rounds, 'round')} over {clients} ({pools})")
        if spec.suspend:
            view.tell("spec.suspend is true: on a cluster this job would wait")
        if self._told:
            view.tell(f"resuming after round {self._told} of {spec.rounds}")
        self._show("starting the aggregator")
        credentials = issue_certificates(self._job, self._uid, self._directory.tls)
        self._server.wait_for(self._roster.expected)
        self._spawn_task(self._serve())
        await self._server.listening.wait()
        self._spawn_task(self._server.watch(credentials, self._follow))
        self._show(f"starting {clients}")
        self._client_tasks = [self._spawn_task(self._keep_client(client)) for client in self._clients]
        await asyncio.sleep(_PATIENCE)
        if not self._begun:
            logs = self._directory.shown(self._directory.logs)
            for line in self._roster.advice(_connected(self._status), self._told + 1, logs):
                view.tell(line)

    async def _serve(self) -> None:
        await self._server.keep()
        self._training_ends()

    def _follow(self, status: pb.FederationStatus) -> None:
        self._begun = self._begun or status.phase not in (pb.FederationStatus.WAITING, pb.FederationStatus.INITIALIZING)
        first = status.phase == pb.FederationStatus.TRAINING and self._status.phase != status.phase
        if first and status.completed_rounds == self._told:
            there = f"{_connected(status)} of {counted(len(self._clients), 'client')}"
            self._view.tell(f"{there} connected after {self._elapsed():.1f} s")
        warnings = list(status.warnings)
        keeps = status.message not in ("", self._status.message, *warnings)
        if keeps and status.phase != pb.FederationStatus.WAITING:
            self._view.warn(one_line(status.message))
        for warning in warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                self._view.warn(one_line(warning))
        if status.completed_rounds >= self._status.completed_rounds:  # one that restarts knows little at first
            self._status = status
        for done in self._book.follow(status):
            self._view.tell_round(done)
        if status.phase == pb.FederationStatus.COMPLETE:
            self._training_ends()
        self._show()
        self._check_quorum()

    def _training_ends(self) -> None:
        if not self._trained.is_set():
            self._trained.set()
            if self._deadline is not None:
                self._deadline.cancel()
            self._spawn_task(self._finish())

    async def _finish(self) -> None:
        """Lets the scripts run to their end, for a while. The aggregator stays, for those that come late."""
        await asyncio.wait(self._client_tasks, timeout=self._finish_seconds)
        late = [client.name for client, child in self._children.items() if child.running]
        if late:
            after = f"{self._finish_seconds:g} s after training was complete (--finish-seconds)"
            self._view.warn(f"{', '.join(late)}: stopped, as the script still ran {after}")
        self._end(None)

    # ---- the clients

    async def _keep_client(self, client: LocalClient) -> None:
        """Starts a client, and again when it failed, within the job's backoffLimit."""
        limit = self._job.spec.backoff_limit
        log = self._directory.logs / f"{client.name}.log"
        tls = client_directory(self._directory.tls, client.pool, client.index)
        command = local_command(self._job.spec.task.command)
        for attempt in range(limit + 1):
            environment = client_environment(
                os.environ, self._job, self._uid, client, attempt, self._server.endpoint, tls, self._directory.scratch
            )
            child = await Child.spawn(command, environment, log, self._cwd)
            self._children[client] = child
            self._show()
            code = await child.wait()
            if code == 0:
                self._roster.left.add(client)
                break
            self._tell_failure(client, child.last_lines(_SHOWN_LINES), reason(code), log)
            if self._trained.is_set():
                break
            if code > 0 and self._failed_alike(client, child.last_lines(1)):
                return
            if attempt == limit:
                self._roster.failed.add(client)
                self._view.warn(f"{client.name} is given up: it failed {counted(limit + 1, 'time')}")
                break
            delay = backoff(attempt + 1)
            self._view.warn(f"{client.name} starts again in {delay:.0f} s (attempt {attempt + 1} of {limit})")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._trained.wait(), delay)
            if self._trained.is_set():  # it is not needed any more
                break
        self._server.wait_for(self._roster.expected)
        self._show()
        self._check_quorum()

    def _tell_failure(self, client: LocalClient, lines: list[str], how: str, log: Path) -> None:
        """Shows the end of a failed client's log, but once where many fail alike."""
        said = lines[-1] if lines else ""
        self._roster.note_failure(client, said or how)
        if said in self._shown_failures:
            lines = [f"as before: {said}"]
        self._shown_failures.add(said)
        when = " after training was complete" if self._trained.is_set() else ""
        shown = self._directory.shown(log)
        self._view.warn("\n".join([f"{client.name} failed{when} ({how}), {shown}:", *(f"  {line}" for line in lines)]))

    def _failed_alike(self, client: LocalClient, lines: list[str]) -> bool:
        """Fails the run where every client has failed in one and the same way before a round was complete."""
        begun = self._status.completed_rounds > self._told
        if begun or not lines or not (cause := self._roster.common_failure):
            return False
        who = "every client" if len(self._clients) > 1 else client.name
        self._end(RunFailed(f"{who} failed at its start: {cause}"))
        return True

    def _running(self) -> list[Child]:
        return [child for child in self._children.values() if child.running]

    def _check_quorum(self) -> None:
        """Fails the run where too few clients are left for it ever to end."""
        if self._trained.is_set():
            return
        if shortage := self._roster.shortage(self._status.phase):
            self._end(RunFailed(shortage))

    # ---- what the user sees

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
                return "taking the first weights"
            case _:
                connected = _connected(self._status)
                return f"{connected} of {clients} connected" if connected else f"starting {clients}"

    def _complete(self) -> int:
        status, objective = self._status, self._job.spec.objective
        best, rounds = status.best, status.completed_rounds or self._job.spec.rounds
        met = f"; {objective.metric} met its target, {objective.target}" if status.target_round else ""
        self._view.tell(f"complete: {counted(rounds, 'round')} in {self._elapsed():.1f} s{met}")
        if best.name:
            self._view.tell(f"best {format_metrics({best.name: best.value})[0]} (round {best.round})")
        if self._status.HasField("privacy"):
            privacy = self._status.privacy
            ended = f"; another round would pass maxEpsilon {privacy.max_epsilon:g}" if privacy.spent else ""
            self._view.tell(f"privacy: epsilon {privacy.epsilon:.4g} (delta {privacy.delta:g}){ended}")
        of_round = f" (round {status.model.round})" if status.HasField("model") else ""
        self._view.tell(f"model: {self._directory.shown(self._directory.model)}{of_round}")
        if status.HasField("best_model") and status.best_model.round != status.model.round:
            self._view.tell(
                f"best model: {self._directory.shown(self._directory.best_model)} (round {status.best_model.round})"
            )
        return EXIT_COMPLETE

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    # ---- how it ends

    def _end(self, error: BaseException | None) -> None:
        if self._outcome.done():
            return
        if error is None:
            self._outcome.set_result(None)
        else:
            self._outcome.set_exception(error)

    def _signalled(self, number: signal.Signals) -> None:
        if self._outcome.done():
            self._hurry.set()  # asked twice: no more patience
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
    """Runs a job in the directory ``root``; returns the exit code. ``code``: the files of task.code.

    Raises :class:`RunDirectoryError`, and :class:`.preflight.CommandError`.
    """
    directory = RunDirectory(root)
    path = {"PATH": inherited(os.environ)["PATH"], **{v.name: v.value for v in job.spec.task.env}}["PATH"]
    where = directory.code if code else Path.cwd()
    check_command(local_command(job.spec.task.command), path, where, manifest.parent, code or None)
    with directory.opened(job, resume=resume, overwrite=overwrite) as uid:
        if directory.finished(job.spec.rounds):
            view.tell(f"{job.name}: all {job.spec.rounds} rounds were done before")
            view.tell(f"model: {directory.shown(directory.model)}")
            return EXIT_COMPLETE

        async def run() -> int:
            return await LocalRun(
                job, uid, directory, view, again, directory.lay_code(code), finish_seconds
            ).run()  # fmt: skip

        return asyncio.run(run())
