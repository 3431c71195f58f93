"""A TCP server in an event loop and thread of its own, so that the rest of the bridge cannot delay it."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from isthmus_contracts.wire.addresses import bound, split

from .loop_thread import LoopThread

# Bytes buffered for a slow receiver before reading from the sender pauses.
BUFFER = 256 << 10
_STOP_SECONDS = 5.0

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class LoopServer:
    """The listener, and the tasks of its open connections."""

    def __init__(self, name: str, serve: Serve, backlog: int) -> None:
        """``serve`` handles one connection, in a task of its own."""
        self.tasks: set[asyncio.Task[Any]] = set()
        self.port = 0
        self._serve = serve
        self._backlog = backlog
        self._thread = LoopThread(name)
        self._server: asyncio.Server | None = None

    def start(self, address: str, both_families: frozenset[str]) -> None:
        """Listen at ``address``; at a host of ``both_families`` with IPv4 and IPv6. Raises ``OSError``."""
        self._thread.start()
        try:
            self._thread.run(self._listen(address, both_families))
        except OSError:
            self._thread.stop()
            raise

    def stop(self) -> None:
        """Close every connection, and stop."""
        if self._server is not None:
            self._thread.run(self._close())
        self._thread.stop()

    async def _listen(self, address: str, both_families: frozenset[str]) -> None:
        host, port = split(address)
        # asyncio itself would listen at `::` for IPv6 only.
        where: dict[str, Any] = {"sock": bound("::", port)} if host in both_families else {"host": host, "port": port}
        self._server = await asyncio.start_server(self._accept, **where, limit=BUFFER, backlog=self._backlog)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            await self._serve(reader, writer)
        finally:
            self.tasks.discard(task)
            # Pending data is still sent, without waiting for it.
            writer.close()

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=_STOP_SECONDS)


def bound_buffers(*ends: asyncio.StreamWriter) -> None:
    """Limit what is buffered for slow receivers."""
    for end in ends:
        end.transport.set_write_buffer_limits(high=BUFFER)


def tune(writer: asyncio.StreamWriter) -> None:
    """Send small messages at once, and detect dead peers."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
