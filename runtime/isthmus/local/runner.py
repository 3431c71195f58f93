"""Runs one FederatedJob on this machine: an aggregator and every client as processes, over gRPC with mutual TLS."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

from grpc import aio

from isthmus_contracts import tasks
from isthmus_contracts.identities import aggregator_server_name
from isthmus_contracts.manifest import FederatedJob
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb.federation_pb2_grpc import ObserverStub
from isthmus_contracts.pki import Credentials
from isthmus_contracts.text import one_line
from isthmus_contracts.transport import aio_channel

from .certificates import AGGREGATOR, issue_certificates
from .plan import LocalClient, backoff, client_environment, inherited, local_clients, local_command
from .process import Child
from .roster import Roster, counted
from .rounds import RoundBook
from .rundir import RunDirectory
from .view import PoolView, Snapshot, View, format_metrics

EXIT_COMPLETE, EXIT_FAILED = 0, 1
_HOST = "127.0.0.1"
# How long a process that is told to stop may take. Seconds.
_GRACE = 10.0
_SHOWN_LINES = 12
_RECONNECT = 0.2


class RunFailed(Exception):
    """The run cannot go on. ``str()`` is one line."""


class Interrupted(Exception):
    """A signal ended the run."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class LocalRun:
    """One run. ``await run()`` returns the exit code, and by then every process is gone."""

    def __init__(
        self, job: FederatedJob, uid: str, directory: RunDirectory, view: View, again: str, cwd: Path | None
    ) -> None:
        """``again``: the command that goes on with the run, for the user to read. ``cwd``: of every process."""
        self._cwd = cwd
        self._job = job
        self._uid = uid
        self._directory = directory
        self._view = view
        self._again = again
        self._clients = local_clients(job)
        self._children: dict[str, Child] = {}
        self._roster = Roster(job, self._clients)
        self._shown_failures: set[str] = set()
        self._told = directory.committed
        self._book = RoundBook(directory.rounds_file, job.spec.objective, self._told)
        self._status = pb.FederationStatus(completed_rounds=self._told, total_rounds=job.spec.rounds)
        self._port = 0
        self._started = time.monotonic()
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hurry = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Runs until training is complete, has failed, or a signal arrives."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # by nohup, or a shell's background job
                loop.add_signal_handler(number, self._signalled, number)
        if limit := self._job.spec.active_deadline_seconds:
            loop.call_later(limit, self._fail, f"not complete after activeDeadlineSeconds ({limit} s)")
        try:
            self._spawn_task(self._run())
            await self._outcome
            return self._complete()
        except RunFailed as error:
            self._view.warn(f"isthmus: {error}; the logs are in {self._directory.shown(self._directory.logs)}")
            return EXIT_FAILED
        except Interrupted as stop:
            running = sum(child.running for child in self._children.values())
            self._view.tell(f"{stop}: stopping {counted(running, 'process')}")
            await self._stop()
            done = self._directory.committed
            self._view.tell(f"stopped after round {done} of {self._job.spec.rounds}; go on with: {self._again}")
            return 128 + stop.number
        finally:
            await self._stop()

    async def _stop(self) -> None:
        """Ends every task and every process: the clients first, which may still hand something in."""
        await tasks.end(self._tasks)
        clients = [child for name, child in self._children.items() if name != AGGREGATOR]
        await asyncio.gather(*(child.stop(_GRACE, self._hurry) for child in clients))
        if aggregator := self._children.get(AGGREGATOR):
            await aggregator.stop(_GRACE, self._hurry)

    async def _run(self) -> None:
        spec, view = self._job.spec, self._view
        pools = ", ".join(f"{pool.name} {pool.replicas}" for pool in spec.pools)
        view.tell(
            f"{self._job.name}: {counted(spec.rounds, 'round')} over {counted(len(self._clients), 'client')} ({pools})"
        )
        if spec.suspend:
            view.tell("spec.suspend is true: on a cluster this job would wait")
        if self._told:
            view.tell(f"resuming after round {self._told} of {spec.rounds}")
        self._show("starting the aggregator")
        credentials = issue_certificates(self._job, self._uid, self._directory.tls)
        listening = asyncio.Event()
        self._spawn_task(self._keep_aggregator(listening))
        await listening.wait()
        self._spawn_task(self._watch(credentials))
        self._show(f"starting {counted(len(self._clients), 'client')}")
        for client in self._clients:
            self._spawn_task(self._keep_client(client))

    # ---- the aggregator

    async def _keep_aggregator(self, listening: asyncio.Event) -> None:
        """Starts the aggregator, and again where it was killed: it resumes from its checkpoints."""
        directory, crashes = self._directory, 0
        ports_file, log = directory.ports_file, directory.logs / "aggregator.log"
        while True:
            ports_file.unlink(missing_ok=True)
            argv = [
                sys.executable, "-m", "isthmus.aggregator", "--job", str(directory.job_file),
                "--tls", str(directory.tls / AGGREGATOR), "--state", str(directory.root),
                "--listen", f"{_HOST}:{self._port}", "--metrics", f"{_HOST}:0", "--ports-file", str(ports_file),
            ]  # fmt: skip
            child = await Child.spawn(argv, inherited(os.environ), log, self._cwd)
            self._children[AGGREGATOR] = child
            waiting = asyncio.create_task(child.wait())
            while not waiting.done() and not ports_file.exists():
                await asyncio.wait([waiting], timeout=0.05)
            if ports_file.exists():
                ports = json.loads(ports_file.read_text(encoding="utf-8"))
                self._port = ports["port"]  # the clients know it: a restarted aggregator has to take it again
                self._view.tell(f"metrics: http://{_HOST}:{ports['metrics_port']}/metrics")
                listening.set()
            code = await waiting
            last = child.last_lines(1) or ["it said nothing"]
            if code == 0:
                self._end(None)
                return
            if code > 0 and code != 128 + signal.SIGTERM:
                raise RunFailed(last[0].removeprefix("isthmus.aggregator: "))
            crashes += 1
            if crashes > self._job.spec.backoff_limit:
                raise RunFailed(f"the aggregator ended {counted(crashes, 'time')} ({_reason(code)})")
            self._view.warn(f"the aggregator ended ({_reason(code)}); starting it again from its last checkpoint")
            await asyncio.sleep(backoff(crashes))

    async def _watch(self, credentials: Credentials) -> None:
        """Follows the aggregator's status, over its restarts too."""
        endpoint = f"{_HOST}:{self._port}"
        async with aio_channel(endpoint, credentials, aggregator_server_name(self._uid)) as channel:
            watch = ObserverStub(channel).WatchStatus  # type: ignore[no-untyped-call,unused-ignore]
            while True:
                try:
                    async for status in watch(pb.GetStatusRequest(job_uid=self._uid), wait_for_ready=True):
                        self._follow(status)
                except aio.AioRpcError:
                    await asyncio.sleep(_RECONNECT)

    def _follow(self, status: pb.FederationStatus) -> None:
        first = status.phase == pb.FederationStatus.TRAINING and self._status.phase != status.phase
        if first and status.completed_rounds == self._told:
            self._view.tell(f"{counted(_connected(status), 'client')} connected after {self._elapsed():.1f} s")
        if status.message != self._status.message and status.phase != pb.FederationStatus.WAITING and status.message:
            self._view.warn(one_line(status.message))  # what keeps it
        if status.completed_rounds >= self._status.completed_rounds:  # one that restarts knows little at first
            self._status = status
        for done in self._book.follow(status):
            self._view.tell_round(done)
        self._show()
        self._check_quorum()

    # ---- the clients

    async def _keep_client(self, client: LocalClient) -> None:
        """Starts a client, and again when it failed, within the job's backoffLimit."""
        limit = self._job.spec.backoff_limit
        log, tls = self._directory.logs / f"{client.name}.log", self._directory.tls / client.pool
        command = local_command(self._job.spec.task.command)
        for attempt in range(limit + 1):
            endpoint = f"{_HOST}:{self._port}"
            scratch = self._directory.scratch
            environment = client_environment(os.environ, self._job, self._uid, client, attempt, endpoint, tls, scratch)
            child = await Child.spawn(command, environment, log, self._cwd)
            self._children[client.name] = child
            self._show()
            code = await child.wait()
            if code == 0 or self._status.phase == pb.FederationStatus.COMPLETE:
                self._roster.left.add(client)
                break
            self._tell_failure(client, child.last_lines(_SHOWN_LINES), _reason(code), log)
            if attempt == limit:
                self._roster.failed.add(client)
                self._view.warn(f"{client.name} is given up: it failed {counted(limit + 1, 'time')}")
                break
            delay = backoff(attempt + 1)
            self._view.warn(f"{client.name} starts again in {delay:.0f} s (attempt {attempt + 1} of {limit})")
            await asyncio.sleep(delay)
        self._show()
        self._check_quorum()

    def _tell_failure(self, client: LocalClient, lines: list[str], reason: str, log: Path) -> None:
        """Shows the end of a failed client's log, but once where many fail alike."""
        how = lines[-1] if lines else ""
        self._roster.note_failure(client, how or reason)
        if how in self._shown_failures:
            lines = [f"as before: {how}"]
        self._shown_failures.add(how)
        self._view.warn(
            "\n".join(
                [f"{client.name} failed ({reason}), {self._directory.shown(log)}:", *(f"  {line}" for line in lines)]
            )
        )

    def _check_quorum(self) -> None:
        """Fails the run where too few clients are left for it ever to end."""
        if shortage := self._roster.shortage(self._status.phase):
            self._fail(shortage)

    # ---- what the user sees

    def _show(self, activity: str = "") -> None:
        spec, status = self._job.spec, self._status
        seen = {pool.name: pool for pool in status.pools}
        pools = []
        for pool in spec.pools:
            members = [client for client in self._clients if client.pool == pool.name]
            running = sum(client.name in self._children and self._children[client.name].running for client in members)
            connected = seen[pool.name].connected if pool.name in seen else 0
            failed = sum(client in self._roster.failed for client in members)
            kind = "cloud" if pool.cloud is not None else "hpc"
            pools.append(PoolView(pool.name, kind, pool.replicas, running, connected, failed))
        self._view.show(Snapshot(activity or self._activity(), status.completed_rounds, spec.rounds, pools))

    def _activity(self) -> str:
        match self._status.phase:
            case pb.FederationStatus.TRAINING:
                return "training"
            case pb.FederationStatus.EVALUATING:
                return "evaluating the final model"
            case pb.FederationStatus.COMPLETE:
                return "ending the clients"
            case _:
                return f"starting {counted(len(self._clients), 'client')}"

    def _complete(self) -> int:
        best, rounds = self._status.best, self._status.completed_rounds or self._job.spec.rounds
        self._view.tell(f"complete: {counted(rounds, 'round')} in {self._elapsed():.1f} s")
        if best.name:
            self._view.tell(f"best {format_metrics({best.name: best.value})[0]} (round {best.round})")
        if self._status.HasField("privacy"):
            privacy = self._status.privacy
            ended = f"; another round would pass maxEpsilon {privacy.max_epsilon:g}" if privacy.spent else ""
            self._view.tell(f"privacy: epsilon {privacy.epsilon:.4g} (delta {privacy.delta:g}){ended}")
        self._view.tell(f"model: {self._directory.shown(self._directory.model)}")
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

    def _fail(self, message: str) -> None:
        self._end(RunFailed(message))

    def _signalled(self, number: signal.Signals) -> None:
        if self._outcome.done():
            self._hurry.set()  # asked twice: no more patience
        self._end(Interrupted(number))

    def _spawn_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end(error)


def _reason(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _connected(status: pb.FederationStatus) -> int:
    return sum(pool.connected for pool in status.pools)


def run_job(
    job: FederatedJob,
    root: Path,
    view: View,
    *,
    code: Mapping[str, bytes],
    resume: bool,
    overwrite: bool,
    again: str,
) -> int:
    """Runs a job in the directory ``root``; returns the exit code. ``code``: the files of task.code.

    Raises :class:`RunDirectoryError`.
    """
    directory = RunDirectory(root)
    with directory.opened(job, resume=resume, overwrite=overwrite) as uid:
        if directory.finished(job.spec.rounds):
            view.tell(f"{job.name}: all {job.spec.rounds} rounds were done before")
            view.tell(f"model: {directory.shown(directory.model)}")
            return EXIT_COMPLETE

        async def run() -> int:
            return await LocalRun(job, uid, directory, view, again, directory.lay_code(code)).run()

        return asyncio.run(run())
