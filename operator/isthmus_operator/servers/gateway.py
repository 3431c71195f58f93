"""The gateway for sites that accept no inbound connections: their bridges open a tunnel, through which they are called.

A caller names its site and is not authenticated at first. The operator then opens TLS to the bridge through that tunnel
with the site's Secret, as for a site that it dials. The tunnel is used only after the bridge has proven its identity,
and all its traffic is TLS between the operator and the bridge.
"""

import asyncio
import logging
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from isthmus_contracts.pb import gateway_pb2 as pb
from isthmus_contracts.pb import gateway_pb2_grpc as rpc
from isthmus_contracts.process.open_files import connections_within, raise_limit
from isthmus_contracts.wire.transport import renewed_public_credentials, server_options
from isthmus_contracts.wire.tunnel import CHUNK, MAX_CONNECTIONS, MAX_FRAME, PROTOCOL, Connections, TunnelError

from .. import __version__
from ..effects.bridge_channels import BridgeError
from ..metrics import GATEWAY_CONNECTED, GATEWAY_TUNNELS
from ..state.observed import ProblemKind

log = logging.getLogger(__name__)

_HELLO_SECONDS = 10.0
# Callers that have not proven their identity yet. Each has ten seconds for its hello and ten for the proof. A further
# one evicts the oldest: an honest bridge needs only a moment, so idle strangers cannot keep it out.
_MAX_UNPROVEN = 64
_MAX_TUNNELS = 1024
_STOP_SECONDS = 1.0
_SITE = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")

Context = aio.ServicerContext[Any, Any]
Prove = Callable[[str, str], Awaitable[None]]


class _RefusedError(Exception):
    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(eq=False)
class _Tunnel:
    site: str
    connections: Connections
    address: str = ""
    number: int = 0
    # Resolved with the reason when the gateway ends the tunnel.
    over: "asyncio.Future[str]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def end(self, why: str) -> None:
        if not self.over.done():
            self.over.set_result(why)


class Gateway(rpc.GatewayServicer):
    """See gateway.proto."""

    def __init__(self, changed: Callable[[str], None]) -> None:
        """``changed`` is called with the name of each site whose bridge connects or disconnects."""
        self.addresses: dict[str, str] = {}
        """By connected site: address of a socket whose connections lead to its bridge."""
        self._changed = changed
        self._prove: Prove | None = None
        self._tunnels: dict[str, _Tunnel] = {}
        # Oldest first.
        self._exited_without_proof: dict[_Tunnel, None] = {}
        self._serial = 0
        self._directory = Path()
        self.port = 0

    async def serve(self, address: str, tls: Path, prove: Prove) -> None:
        """Serve until cancelled; renewed certificates are reloaded. Raises ``OSError``.

        ``prove`` raises :class:`BridgeError` unless the site's bridge is reached at an address.
        """
        self._prove = prove
        options = [
            *server_options(calls=8),
            ("grpc.max_receive_message_length", MAX_FRAME),
            ("grpc.max_allowed_incoming_connections", connections_within(raise_limit(), 2 * _MAX_TUNNELS)),
        ]
        server = aio.server(options=options, maximum_concurrent_rpcs=_MAX_TUNNELS + 2 * _MAX_UNPROVEN)
        rpc.add_GatewayServicer_to_server(self, server)
        # Private, since data written to these sockets reaches bridges.
        self._directory = Path(tempfile.mkdtemp(prefix="isthmus-gateway-"))
        try:
            try:
                self.port = server.add_secure_port(address, renewed_public_credentials(tls))
            except RuntimeError as error:
                raise OSError(f"the gateway cannot listen at {address}: {error}") from None
            await server.start()
            log.info("gateway at %s", address)
            # Not wait_for_termination(): after its cancellation, stop() no longer works.
            await asyncio.get_running_loop().create_future()
        finally:
            for tunnel in self._tunnels.values():
                tunnel.end("the operator stops")
            await server.stop(_STOP_SECONDS)
            shutil.rmtree(self._directory, ignore_errors=True)

    def expect(self, site: str) -> None:
        """Export the connection state of a site that dials out."""
        GATEWAY_CONNECTED.labels(site).set(float(site in self._tunnels))

    def drop(self, site: str) -> None:
        """Close the tunnel of a site that no longer dials out."""
        tunnel = self._tunnels.get(site)
        if tunnel is not None:
            tunnel.end("the HPCSite is gone or no longer dials out")
        with suppress(KeyError):
            GATEWAY_CONNECTED.remove(site)

    async def Connect(self, request_iterator: AsyncIterator[pb.Frame], context: Context) -> None:  # type: ignore[override]
        """Serve one bridge's tunnel, from its hello until either side ends it."""
        tunnel = _Tunnel("unknown", Connections(context.write))
        self._take_place(tunnel)
        try:
            tunnel.site = await self._hello(tunnel, request_iterator)
            await self._tunnel(tunnel, request_iterator, context)
        except _RefusedError as error:
            GATEWAY_TUNNELS.labels("refused").inc()
            log.warning("gateway: %s from %s refused: %s", tunnel.site, context.peer(), error)
            await context.abort(error.code, str(error))
        finally:
            self._exited_without_proof.pop(tunnel, None)

    def _take_place(self, tunnel: _Tunnel) -> None:
        """Register an unauthenticated caller; if there are too many, evict the oldest."""
        if len(self._exited_without_proof) >= _MAX_UNPROVEN:
            oldest = next(iter(self._exited_without_proof))
            del self._exited_without_proof[oldest]
            oldest.end("too many bridges are connecting; try again")
        self._exited_without_proof[tunnel] = None

    async def _hello(self, tunnel: _Tunnel, frames: AsyncIterator[pb.Frame]) -> str:
        reading = asyncio.ensure_future(anext(aiter(frames), None))
        try:
            await asyncio.wait((reading, tunnel.over), timeout=_HELLO_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if tunnel.over.done():
                raise _RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, tunnel.over.result())
            if not reading.done():
                raise _RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello")
            first = reading.result()
        finally:
            reading.cancel()
        if first is None or first.WhichOneof("kind") != "hello":
            raise _RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "the first frame must be a hello")
        if first.hello.protocol != PROTOCOL:
            message = f"the gateway supports protocol {PROTOCOL}, the bridge {first.hello.protocol}"
            raise _RefusedError(grpc.StatusCode.INVALID_ARGUMENT, message)
        if _SITE.fullmatch(first.hello.site) is None:
            raise _RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "the site's name is not a valid HPCSite name")
        return first.hello.site

    async def _tunnel(self, tunnel: _Tunnel, frames: AsyncIterator[pb.Frame], context: Context) -> None:
        async with self._socket(tunnel):
            reading = asyncio.create_task(_read(frames, tunnel.connections))
            try:
                await self._admit(tunnel, reading)
                await tunnel.connections.send(pb.Frame(welcome=pb.Welcome(version=__version__)))
                self._put(tunnel)
                await asyncio.wait((reading, tunnel.over), return_when=asyncio.FIRST_COMPLETED)
                why = tunnel.over.result() if tunnel.over.done() else _end(reading)
                log.info("gateway: the tunnel of %s ended: %s", tunnel.site, why)
                if tunnel.over.done():
                    await context.abort(grpc.StatusCode.ABORTED, why)
                if not reading.cancelled() and isinstance(reading.exception(), TunnelError):
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, why)
            finally:
                reading.cancel()
                tunnel.connections.close()
                self._take(tunnel)

    async def _admit(self, tunnel: _Tunnel, reading: "asyncio.Task[None]") -> None:
        """Wait until the bridge has proven that it belongs to the site."""
        assert self._prove is not None
        proof = asyncio.ensure_future(self._prove(tunnel.site, tunnel.address))
        try:
            await asyncio.wait((proof, reading, tunnel.over), return_when=asyncio.FIRST_COMPLETED)
            if tunnel.over.done():
                raise _RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, tunnel.over.result())
            if reading.done():
                raise _RefusedError(grpc.StatusCode.INVALID_ARGUMENT, _end(reading))
            await proof
        except BridgeError as error:
            denied = error.kind is ProblemKind.DENIED
            code = grpc.StatusCode.PERMISSION_DENIED if denied else grpc.StatusCode.UNAVAILABLE
            raise _RefusedError(code, str(error)) from None
        finally:
            proof.cancel()
            self._exited_without_proof.pop(tunnel, None)

    def _put(self, tunnel: _Tunnel) -> None:
        older = self._tunnels.get(tunnel.site)
        self._tunnels[tunnel.site] = tunnel
        self.addresses[tunnel.site] = tunnel.address
        if older is not None:
            GATEWAY_TUNNELS.labels("replaced").inc()
            older.end("a newer tunnel of the site took its place")
        GATEWAY_TUNNELS.labels("accepted").inc()
        GATEWAY_CONNECTED.labels(tunnel.site).set(1)
        log.info("gateway: the bridge of %s is connected", tunnel.site)
        self._changed(tunnel.site)

    def _take(self, tunnel: _Tunnel) -> None:
        if self._tunnels.get(tunnel.site) is tunnel:
            del self._tunnels[tunnel.site], self.addresses[tunnel.site]
            with suppress(KeyError):  # the site was dropped
                GATEWAY_CONNECTED.remove(tunnel.site)
                GATEWAY_CONNECTED.labels(tunnel.site).set(0)
            self._changed(tunnel.site)

    @asynccontextmanager
    async def _socket(self, tunnel: _Tunnel) -> AsyncIterator[None]:
        """Provide a socket for gRPC channels; each of its connections is forwarded through the tunnel."""
        self._serial += 1
        path = self._directory / f"{self._serial}.sock"
        pumps: set[asyncio.Task[Any]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            pumps.add(task)
            try:
                if len(tunnel.connections) >= MAX_CONNECTIONS:
                    return
                tunnel.number += 1
                number = tunnel.number
                tunnel.connections.add(number, writer)
                await tunnel.connections.send(pb.Frame(open=number))
                await tunnel.connections.pump(number, reader)
            except (aio.UsageError, aio.InternalError, asyncio.CancelledError):
                pass  # the tunnel is gone
            finally:
                pumps.discard(task)
                writer.close()

        server = await asyncio.start_unix_server(accept, path, limit=CHUNK)
        tunnel.address = f"unix:{path}"
        try:
            yield
        finally:
            server.close()
            for task in list(pumps):
                task.cancel()
            path.unlink(missing_ok=True)


async def _read(frames: AsyncIterator[pb.Frame], connections: Connections) -> None:
    async for frame in frames:
        await connections.receive(frame)


def _end(reading: "asyncio.Task[None]") -> str:
    """Return why the bridge's stream ended."""
    error = None if reading.cancelled() else reading.exception()
    if error is None:
        return "the bridge closed it"
    return str(error) if isinstance(error, TunnelError) else f"the connection broke ({type(error).__name__})"
