"""The aggregator of a local run: started, and again where it was killed or another program holds its port."""

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
from .outcome import RunFailed, reason
from .plan import backoff, inherited
from .process import Child
from .roster import counted
from .run_directory import RunDirectory
from .view import View

_HOST = "127.0.0.1"
_RECONNECT = 0.2


class Server:
    """The aggregator's process, and what the run and it have to say to each other."""

    def __init__(self, job: FederatedJob, uid: str, directory: RunDirectory, view: View, cwd: Path | None) -> None:
        """``cwd``: where it runs, if not where we do."""
        self._job = job
        self._uid = uid
        self._directory = directory
        self._view = view
        self._cwd = cwd
        self._port = 0
        self._awaited = 0
        self._awaited_changed = asyncio.Event()
        self.child: Child | None = None
        self.listening = asyncio.Event()
        """It has been ready for clients."""

    @property
    def running(self) -> bool:
        """True if there is a process."""
        return self.child is not None and self.child.running

    @property
    def endpoint(self) -> str:
        """Where clients find it; the same after a restart."""
        return f"{_HOST}:{self._port}"

    def wait_for(self, clients: int) -> None:
        """Sets how many clients it waits for before its first round."""
        self._awaited = clients
        self._awaited_changed.set()

    async def keep(self) -> None:
        """Keeps it running until it has been told to end after training. Raises :class:`RunFailed`."""
        failures = 0
        while (code := await self._run()) != 0:
            said = (self.child.last_lines(1) if self.child else []) or ["it said nothing"]
            why = said[0].removeprefix("isthmus.aggregator: ")
            if code > 0 and code not in (128 + signal.SIGTERM, EXIT_PORT_TAKEN):
                raise RunFailed(why)
            failures += 1
            why = why if code == EXIT_PORT_TAKEN else reason(code)
            if failures > self._job.spec.backoff_limit:
                raise RunFailed(f"the aggregator ended {counted(failures, 'time')} ({why})")
            self._view.warn(f"the aggregator ended ({why}); starting it again from its last checkpoint")
            await asyncio.sleep(backoff(failures))

    async def _run(self) -> int:
        """Starts it and waits for its end; the exit code."""
        directory = self._directory
        directory.ports_file.unlink(missing_ok=True)
        argv = [
            sys.executable, "-m", "isthmus.aggregator", "--job", str(directory.job_file),
            "--tls", str(directory.tls / AGGREGATOR), "--state", str(directory.root), "--listen", self.endpoint,
            "--metrics", f"{_HOST}:0", "--ports-file", str(directory.ports_file),
            "--wait-for", str(self._awaited), "--stay",
        ]  # fmt: skip
        self.child = await Child.spawn(argv, inherited(os.environ), directory.logs / "aggregator.log", self._cwd)
        waiting = asyncio.create_task(self.child.wait())
        while not waiting.done() and not directory.ports_file.exists():
            await asyncio.wait([waiting], timeout=0.05)
        if directory.ports_file.exists():
            ports = json.loads(directory.ports_file.read_text(encoding="utf-8"))
            self._port = ports["port"]  # the clients know it: a restarted aggregator has to take it again
            self._view.tell(f"metrics: http://{_HOST}:{ports['metrics_port']}/metrics")
            self.listening.set()
        return await waiting

    async def watch(self, credentials: Credentials, follow: Callable[[pb.FederationStatus], None]) -> None:
        """Follows its status, over its restarts too."""
        async with aio_channel(self.endpoint, credentials, aggregator_server_name(self._uid)) as channel:
            observer: Any = ObserverStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
            telling = asyncio.create_task(self._tell_awaited(observer))
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
                telling.cancel()

    async def _tell_awaited(self, observer: Any) -> None:
        """Says whenever fewer clients are left to wait for."""
        while True:
            await self._awaited_changed.wait()
            self._awaited_changed.clear()
            try:
                await observer.WaitFor(pb.WaitForRequest(job_uid=self._uid, clients=self._awaited), wait_for_ready=True)
            except aio.AioRpcError:
                self._awaited_changed.set()
                await asyncio.sleep(_RECONNECT)
