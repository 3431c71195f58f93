"""The aggregator's process in a local run, restarted if it is killed or another program takes its port."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpc import aio

from isthmus_contracts.identities import aggregator_server_name
from isthmus_contracts.manifests.manifest import FederatedJob
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb.federation_pb2_grpc import ObserverStub
from isthmus_contracts.wire.pki import Credentials
from isthmus_contracts.wire.transport import aio_channel

from ..aggregator.exits import EXIT_PORT_TAKEN
from .certificates import AGGREGATOR
from .child_process import ChildProcess
from .outcome import RunFailed, reason
from .plan import backoff, inherited
from .roster import counted
from .run_directory import RunDirectory
from .view import View

_HOST = "127.0.0.1"
_RECONNECT = 0.2


class AggregatorProcess:
    """The aggregator's process, and the run's connection to it."""

    def __init__(self, job: FederatedJob, uid: str, directory: RunDirectory, view: View, cwd: Path | None) -> None:
        """``cwd``: its working directory, by default the runner's."""
        self._job = job
        self._uid = uid
        self._directory = directory
        self._view = view
        self._cwd = cwd
        self._port = 0
        self._awaited = 0
        self._awaited_changed = asyncio.Event()
        self.child: ChildProcess | None = None
        self.listening = asyncio.Event()
        """Set once it has accepted connections."""

    @property
    def running(self) -> bool:
        """True while the process runs."""
        return self.child is not None and self.child.running

    @property
    def endpoint(self) -> str:
        """Address for clients, which does not change with a restart."""
        return f"{_HOST}:{self._port}"

    def wait_for(self, clients: int) -> None:
        """Set the number of clients that it waits for before its first round."""
        self._awaited = clients
        self._awaited_changed.set()

    async def keep(self) -> None:
        """Run it, with restarts, until it ends after training. Raises :class:`RunFailed`."""
        failures = 0
        while (code := await self._run()) != 0:
            lines = (self.child.last_lines(1) if self.child else []) or ["it wrote no output"]
            why = lines[0].removeprefix("isthmus.aggregator: ")
            if code > 0 and code not in (128 + signal.SIGTERM, EXIT_PORT_TAKEN):
                raise RunFailed(why)
            failures += 1
            why = why if code == EXIT_PORT_TAKEN else reason(code)
            if failures > self._job.spec.backoff_limit:
                raise RunFailed(f"the aggregator ended {counted(failures, 'time')} ({why})")
            self._view.warn(f"the aggregator ended ({why}); restarting it from its last checkpoint")
            await asyncio.sleep(backoff(failures))

    async def _run(self) -> int:
        """Start it and wait for its end; return the exit code."""
        directory = self._directory
        directory.ports_file.unlink(missing_ok=True)
        argv = [
            sys.executable, "-m", "isthmus.aggregator", "--job", str(directory.job_file),
            "--tls", str(directory.tls / AGGREGATOR), "--state", str(directory.root), "--listen", self.endpoint,
            "--metrics", f"{_HOST}:0", "--ports-file", str(directory.ports_file),
            "--wait-for", str(self._awaited), "--stay",
        ]  # fmt: skip
        self.child = await ChildProcess.spawn(argv, inherited(os.environ), directory.logs / "aggregator.log", self._cwd)
        waiting = asyncio.create_task(self.child.wait())
        while not waiting.done() and not directory.ports_file.exists():
            await asyncio.wait([waiting], timeout=0.05)
        if directory.ports_file.exists():
            ports = json.loads(directory.ports_file.read_text(encoding="utf-8"))
            self._port = ports["port"]  # clients know this port, so a restarted aggregator must use it again
            self._view.info(f"metrics: http://{_HOST}:{ports['metrics_port']}/metrics")
            self.listening.set()
        return await waiting

    async def watch(self, credentials: Credentials, follow: Callable[[pb.FederationStatus], None]) -> None:
        """Pass each status to ``follow``; reconnect after restarts."""
        async with aio_channel(self.endpoint, credentials, aggregator_server_name(self._uid)) as channel:
            observer: Any = ObserverStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
            sender = asyncio.create_task(self._send_awaited(observer))
            try:
                while True:
                    try:
                        async for status in observer.WatchStatus(
                            pb.GetStatusRequest(job_uid=self._uid), wait_for_ready=True
                        ):
                            follow(status)
                    except aio.AioRpcError:
                        await asyncio.sleep(_RECONNECT)
            finally:
                sender.cancel()

    async def _send_awaited(self, observer: Any) -> None:
        """Send the number of clients to wait for whenever it changes."""
        while True:
            await self._awaited_changed.wait()
            self._awaited_changed.clear()
            try:
                await observer.WaitFor(pb.WaitForRequest(job_uid=self._uid, clients=self._awaited), wait_for_ready=True)
            except aio.AioRpcError:
                self._awaited_changed.set()
                await asyncio.sleep(_RECONNECT)
