"""The relay: forwards connections from compute nodes to the aggregator whose server name they request.

TLS runs from the client to the aggregator, so the relay sees ciphertext, and reads only the server name in the first
message. It looks the name up among the live pools, so it connects to no other address.
"""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from isthmus_contracts.wire.addresses import joined, split

from ...metrics import Metrics
from ...policy.policy import RelaySettings
from ..loop_server import BUFFER, LoopServer, bound_buffers, tune
from .capacity import BACKLOG, max_unnamed, reserve_files
from .client_hello import ClientHello, NotTls

log = logging.getLogger(__name__)

_HELLO_SECONDS = 10.0
_DIAL_SECONDS = 15.0
# gRPC sends a ping every half minute: a connection without data for this long is dead. Seconds.
_IDLE_SECONDS = 300.0
_CHUNK = 64 << 10
_SPARE_CONNECTIONS = 8
# Directions, as the metric names them.
_UP, _DOWN = "to-aggregator", "to-client"
# Refusals for one reason are logged once in this time, with their number: anyone can cause them. Seconds.
_QUIET_SECONDS = 10.0


@dataclass(frozen=True)
class Route:
    """The aggregator to which the clients of a pool connect."""

    host: str
    port: int
    connections: int
    """Limit of connections open at a time."""


Lookup = Callable[[str], Route | None]


def connections_of(replicas: int) -> int:
    """Return how many connections the clients of a pool may have: two each, since a new one may replace an old one."""
    return 2 * replicas + _SPARE_CONNECTIONS


class RefusedError(Exception):
    """The connection is refused. ``reason``: the label for the metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Relay:
    """The relay, in an event loop and thread of its own, so that the rest of the bridge cannot delay it."""

    def __init__(self, settings: RelaySettings, lookup: Lookup, metrics: Metrics) -> None:
        """``lookup`` returns the route of a server name. It may read the disk, and runs in a thread."""
        self._settings = settings
        self._lookup = lookup
        self._metrics = metrics
        self._most = settings.connections
        self._open = Counter[str]()
        self._forwarded = Counter[tuple[str, str]]()
        self._lock = threading.Lock()
        self._unnamed = 0
        # By reason: when the last refusal was logged, and how many were not logged since.
        self._reported: dict[str, tuple[float, int]] = {}
        self._server = LoopServer("relay", self._serve, BACKLOG)

    @property
    def port(self) -> int:
        """The port at which it listens."""
        return self._server.port

    def forwarded(self, name: str) -> tuple[int, int]:
        """Return the bytes forwarded for a server name since the last call: to the aggregator, and to the clients."""
        name = name.lower()
        with self._lock:
            return self._forwarded.pop((name, _UP), 0), self._forwarded.pop((name, _DOWN), 0)

    def start(self) -> None:
        """Start to listen. Raises ``OSError``."""
        self._most = reserve_files(self._settings.connections)
        if self._most < self._settings.connections:
            log.warning(
                "relay: room for %d connections only, not for %d: raise the limit of open files (LimitNOFILE=)",
                self._most, self._settings.connections,
            )  # fmt: skip
        self._server.start(self._settings.listen, frozenset({"::"}))

    def stop(self) -> None:
        """Close every connection, and stop. Clients reconnect to the next bridge."""
        self._server.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = ""
        try:
            if len(self._server.tasks) > self._most:
                raise RefusedError("limit", f"{self._most} connections are open")
            first, name = await self._first(reader)
            route = await asyncio.to_thread(self._lookup, name)
            if route is None:
                why = f"no live pool has the server name {name!r}" if name else "no server name was sent"
                raise RefusedError("unknown", why)
            if self._open[name] >= route.connections:
                raise RefusedError("limit", f"{route.connections} connections to {name} are open")
            self._open[name] += 1
            self._metrics.relay_connections.inc()
            try:
                await self._join(first, reader, writer, route, name)
            finally:
                self._metrics.relay_connections.dec()
                self._open[name] -= 1
                if not self._open[name]:
                    del self._open[name]
        except RefusedError as error:
            self._refused(error.reason, writer, str(error))
        except TimeoutError:
            self._refused("timeout", writer, f"no data for too long ({name or 'no server name yet'})")
        except NotTls as error:
            self._refused("not-tls", writer, str(error))
        except (OSError, asyncio.IncompleteReadError) as error:
            log.debug("a relayed connection failed: %s", error)

    async def _first(self, reader: asyncio.StreamReader) -> tuple[bytes, str]:
        if self._unnamed >= max_unnamed(self._most):
            raise RefusedError("limit", f"{self._unnamed} connections have not sent a server name yet")
        self._unnamed += 1
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                return await _hello(reader)
        finally:
            self._unnamed -= 1

    def _refused(self, reason: str, writer: asyncio.StreamWriter, message: str) -> None:
        self._metrics.relay_refused.labels(reason).inc()
        now = asyncio.get_running_loop().time()
        last, untold = self._reported.get(reason, (-_QUIET_SECONDS, 0))
        if now < last + _QUIET_SECONDS:
            self._reported[reason] = last, untold + 1
            return
        self._reported[reason] = now, 0
        more = f" ({untold} similar ones since the last message)" if untold else ""
        peer = writer.get_extra_info("peername")
        log.warning("relay: %s%s", message, more, extra={"peer": str(peer[0]) if peer else ""})

    async def _join(
        self, first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, route: Route, name: str
    ) -> None:
        try:
            async with asyncio.timeout(_DIAL_SECONDS):
                far_reader, far_writer = await asyncio.open_connection(route.host, route.port, limit=BUFFER)
        except (OSError, TimeoutError) as error:
            raise RefusedError(
                "unreachable", f"cannot reach {joined(route.host, route.port)}: {error or 'time-out'}"
            ) from None
        try:
            bound_buffers(writer, far_writer)
            tune(writer)
            tune(far_writer)
            far_writer.write(first)
            self._metrics.relay_bytes.labels(_UP).inc(len(first))
            self._note(name, _UP, len(first))
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass_on(reader, far_writer, name, _UP))
                both.create_task(self._pass_on(far_reader, writer, name, _DOWN))
        except* TimeoutError:
            raise TimeoutError from None
        except* OSError as group:
            raise group.exceptions[0] from None
        finally:
            far_writer.close()

    def _note(self, name: str, direction: str, size: int) -> None:
        with self._lock:
            self._forwarded[name, direction] += size

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str, direction: str
    ) -> None:
        counter = self._metrics.relay_bytes.labels(direction)
        while True:
            async with asyncio.timeout(_IDLE_SECONDS):
                data = await reader.read(_CHUNK)
                if not data:
                    break
                writer.write(data)
                # Wait for a slow receiver. Its sender is not read in the meantime, so that TCP slows it down.
                await writer.drain()
            counter.inc(len(data))
            self._note(name, direction, len(data))
        with suppress(OSError):
            writer.write_eof()


async def _hello(reader: asyncio.StreamReader) -> tuple[bytes, str]:
    """Return the first bytes of a client, and the server name in them."""
    hello = ClientHello()
    while more := await reader.read(_CHUNK):
        name = hello.feed(more)
        if name is not None:
            return bytes(hello.data), name
    raise NotTls("closed before a ClientHello")


def routes(listed: Iterable[tuple[str, str, int]]) -> dict[str, Route]:
    """Return the routes by server name, from (name, host:port, clients) of the live pools, oldest first.

    The pools of a job share a name. If two callers claim the same name, the older pool keeps it: TLS ends at the
    aggregator, so a wrong address can only make connections fail.
    """
    found: dict[str, Route] = {}
    for name, endpoint, replicas in listed:
        host, number = split(endpoint)
        key = name.lower()
        old = found.get(key)
        if old is None:
            found[key] = Route(host, number, connections_of(replicas))
        elif (old.host, old.port) == (host, number):
            found[key] = Route(host, number, old.connections + 2 * replicas)
    return found
