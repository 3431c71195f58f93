"""Tunnels to operators' gateways, for sites that accept no inbound connections.

A tunnel carries connections to the bridge's own server, with TLS, the caller's certificate and the policy's decision
as for inbound connections. The gateway forwards bytes, and cannot make requests itself.
"""

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from isthmus_contracts.pb import gateway_pb2 as pb
from isthmus_contracts.pb.gateway_pb2_grpc import GatewayStub
from isthmus_contracts.process import asyncio_tasks, backoff
from isthmus_contracts.wire.transport import aio_public_channel
from isthmus_contracts.wire.tunnel import CHUNK, MAX_CONNECTIONS, PROTOCOL, Connections, TunnelError

from .. import __version__
from ..metrics import Metrics
from ..policy.policy import GatewaySettings
from .loop_thread import LoopThread
from .proxy import proxy_for

log = logging.getLogger(__name__)

# Pause before the next attempt, in seconds: doubled each time and shortened at random by up to a half, so that the
# sites of a gateway that restarts do not all dial at once.
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
# After a tunnel that lasted this long, the pauses start again from the shortest. Seconds.
_GOOD_SECONDS = 60.0
_WELCOME_SECONDS = 40.0
_LOCAL_SECONDS = 5.0


def pause(failures: int, chance: float) -> float:
    """Return the pause in seconds after ``failures`` earlier failures in a row. ``chance``: random number in [0, 1)."""
    return backoff.delay(failures + 1, _FIRST_PAUSE, _LONGEST_PAUSE) * (1.0 - 0.5 * chance)


class DialOut:
    """One tunnel to each gateway, in an event loop and thread of their own."""

    def __init__(self, gateways: Sequence[GatewaySettings], site: str, tls_dir: Path, metrics: Metrics) -> None:
        self._gateways = gateways
        self._site = site
        self._tls_dir = tls_dir
        self._metrics = metrics
        self._socket = Path()
        self._thread = LoopThread("dial-out")
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, socket: Path) -> None:
        """Start to dial. ``socket``: the UNIX socket of the bridge's own server."""
        self._socket = socket
        self._thread.start()
        self._thread.run(self._begin())

    def stop(self) -> None:
        """Close the tunnels, and stop."""
        if self._thread.running:
            self._thread.run(asyncio_tasks.end(self._tasks))
        self._thread.stop()

    async def _begin(self) -> None:
        for gateway in self._gateways:
            self._metrics.gateway_connected.labels(gateway.address).set(0)
            self._tasks.append(asyncio.create_task(self._keep(gateway)))

    async def _keep(self, gateway: GatewaySettings) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            try:
                why, result = await self._tunnel(gateway)
            except OSError as error:
                why, result = f"{error.filename or 'the gateway'}: {error.strerror or error}", "failed"
            except Exception:
                log.exception("the tunnel failed unexpectedly", extra={"gateway": gateway.address})
                why, result = "an error of the bridge", "failed"
            finally:
                self._metrics.gateway_connected.labels(gateway.address).set(0)
            self._metrics.gateway_tunnels.labels(gateway.address, result).inc()
            failures = 0 if time.monotonic() - began > _GOOD_SECONDS else failures
            seconds = pause(failures, random.random())  # noqa: S311
            failures += 1
            log.warning(
                "no tunnel to the gateway: %s; reconnecting in %.1f s", why, seconds,
                extra={"gateway": gateway.address},
            )  # fmt: skip
            await asyncio.sleep(seconds)

    async def _tunnel(self, gateway: GatewaySettings) -> tuple[str, str]:
        """Open a tunnel and serve it until it ends; return why it ended, and the metrics' label (lost, failed)."""
        authority = gateway.authority(self._tls_dir)
        channel = aio_public_channel(gateway.address, authority, gateway.server_name, proxy_for(gateway))
        welcomed = False
        connections: Connections | None = None
        pumps: set[asyncio.Task[None]] = set()
        try:
            stub: Any = GatewayStub(channel)
            call: aio.StreamStreamCall[pb.Frame, pb.Frame] = stub.Connect()
            connections = Connections(call.write)
            hello = pb.Hello(protocol=PROTOCOL, site=gateway.site or self._site, version=__version__)
            async with asyncio.timeout(_WELCOME_SECONDS) as patience:
                await connections.send(pb.Frame(hello=hello))
                while (frame := await call.read()) is not aio.EOF:
                    assert isinstance(frame, pb.Frame)
                    match frame.WhichOneof("kind"):
                        case "welcome" if not welcomed:
                            welcomed = True
                            patience.reschedule(None)
                            self._metrics.gateway_connected.labels(gateway.address).set(1)
                            log.info("connected to the gateway", extra={"gateway": gateway.address})
                        case "open":
                            await self._open(frame.open, connections, pumps)
                        case _:
                            await connections.receive(frame)
            return _status(await call.code(), await call.details()), "lost" if welcomed else "failed"
        except TimeoutError:
            return "it does not answer", "failed"
        except TunnelError as error:
            return str(error), "failed"
        except aio.AioRpcError as error:
            return _status(error.code(), error.details()), "lost" if welcomed else "failed"
        finally:
            for pump in pumps:
                pump.cancel()
            if connections is not None:
                connections.close()
            await channel.close()

    async def _open(self, number: int, connections: Connections, pumps: "set[asyncio.Task[None]]") -> None:
        if number in connections:
            raise TunnelError(f"the gateway opened the connection {number} twice")
        if len(connections) >= MAX_CONNECTIONS:
            log.warning("the gateway requested more than %d connections at a time", MAX_CONNECTIONS)
            await connections.send(pb.Frame(close=number))
            return
        try:
            async with asyncio.timeout(_LOCAL_SECONDS):
                reader, writer = await asyncio.open_unix_connection(self._socket, limit=CHUNK)
        except (OSError, TimeoutError) as error:
            log.error("the bridge's own server does not answer: %s", error or "time-out")
            await connections.send(pb.Frame(close=number))
            return
        connections.add(number, writer)
        pump = asyncio.create_task(_pump(connections, number, reader))
        pumps.add(pump)
        pump.add_done_callback(pumps.discard)


async def _pump(connections: Connections, number: int, reader: asyncio.StreamReader) -> None:
    try:
        await connections.pump(number, reader)
    except (aio.AioRpcError, asyncio.InvalidStateError):
        log.debug("the tunnel ended while a connection was open")


def _status(code: grpc.StatusCode, details: str | None) -> str:
    if code is grpc.StatusCode.OK:
        return "the gateway closed it"
    return f"{code.name}: {' '.join((details or '').split())[:500]}"
