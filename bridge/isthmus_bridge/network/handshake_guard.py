"""The listener for callers: accepts TCP connections, and forwards those that send data to the gRPC server.

Anyone can open connections and send nothing, and each takes a file descriptor. Connections without a complete TLS
handshake are therefore limited in number and in time; above the limit the oldest is closed, since honest callers
complete the handshake quickly. Descriptors for the bridge itself (journal, Slurm's programs) stay free.
"""

import asyncio
import logging
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

from .loop_server import BUFFER, LoopServer, bound_buffers, tune

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 20.0
_DIAL_SECONDS = 15.0
# Limits of connections without a complete handshake, and of all connections.
MAX_HANDSHAKES = 32
MAX_CONNECTIONS = 96
# asyncio accepts this many at once, before any can be closed.
_BACKLOG = 32
# For the journal, Slurm's programs and the bridge's other ports. A connection that is passed on takes two descriptors.
_OWN_FILES = 128
_EACH = 2
_CHUNK = 64 << 10
_APPLICATION_DATA = 0x17
_RECORD_HEADER = 5
_ALL = frozenset({"::", "0.0.0.0"})  # noqa: S104
_QUIET_SECONDS = 60.0


def connection_limits(files: int) -> tuple[int, int]:
    """Return how many connections a limit of open files allows, and how many of them without a complete handshake."""
    most = max(8, min(MAX_CONNECTIONS, (files - _OWN_FILES - _BACKLOG) // _EACH))
    return most, max(4, min(MAX_HANDSHAKES, most // 2))


class TlsRecords:
    """Parser of the client's TLS records, up to its first complete protected record.

    In TLS 1.3 this record is the client's certificate, after which the server closes unknown callers; before 1.3 it
    follows the handshake.
    """

    def __init__(self) -> None:
        self.handshake_done = False
        self._header = bytearray()
        self._left = 0
        self._protected = False

    def feed(self, data: bytes) -> None:
        """Parse bytes that the client sent."""
        at = 0
        while at < len(data) and not self.handshake_done:
            if self._left:
                step = min(self._left, len(data) - at)
                self._left -= step
                at += step
            else:
                step = min(_RECORD_HEADER - len(self._header), len(data) - at)
                self._header += data[at : at + step]
                at += step
                if len(self._header) < _RECORD_HEADER:
                    return
                self._protected = self._header[0] == _APPLICATION_DATA
                self._left = int.from_bytes(self._header[3:5], "big")
                self._header.clear()
            if not self._left and self._protected:
                self.handshake_done = True


class HandshakeGuard:
    """The listener, in an event loop and thread of its own."""

    def __init__(self, address: str, inner: Path) -> None:
        """``inner``: the UNIX socket of the gRPC server."""
        self._address = address
        self._inner = inner
        self._max_connections, self._max_handshaking = connection_limits(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        # In the order of their arrival.
        self._handshaking: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
        self._reported, self._ended = -_QUIET_SECONDS, 0
        self._server = LoopServer("handshake-guard", self._serve, _BACKLOG)

    @property
    def port(self) -> int:
        """The port at which it listens."""
        return self._server.port

    def start(self) -> None:
        """Start to listen. Raises ``OSError``."""
        self._server.start(self._address, _ALL)

    def stop(self) -> None:
        """Close every connection, and stop."""
        self._server.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handshaking[task] = writer
        if len(self._handshaking) > self._max_handshaking or len(self._server.tasks) > self._max_connections:
            self._end_oldest()
        try:
            first = await asyncio.wait_for(reader.read(_CHUNK), HANDSHAKE_SECONDS)
            if first:
                await self._join(task, first, reader, writer)
        except (OSError, TimeoutError) as error:
            log.debug("a caller's connection failed: %s", error)
        finally:
            self._handshaking.pop(task, None)

    def _end_oldest(self) -> None:
        task = next(iter(self._handshaking))
        self._handshaking.pop(task).transport.abort()
        task.cancel()
        self._ended += 1
        now = asyncio.get_running_loop().time()
        if now >= self._reported + _QUIET_SECONDS:
            log.warning("too many connections without a TLS handshake: closed %d, the oldest first", self._ended)
            self._reported, self._ended = now, 0

    async def _join(
        self, task: "asyncio.Task[Any]", first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        async with asyncio.timeout(_DIAL_SECONDS):
            near_reader, near_writer = await asyncio.open_unix_connection(self._inner, limit=BUFFER)
        try:
            bound_buffers(writer, near_writer)
            tune(writer)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._inward(task, first, reader, near_writer))
                both.create_task(_pass_on(near_reader, writer))
        except* OSError as group:
            raise group.exceptions[0] from None
        finally:
            near_writer.close()

    async def _inward(
        self, task: "asyncio.Task[Any]", data: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Forward what the caller sends, and note when its handshake is complete."""
        records = TlsRecords()
        async with asyncio.timeout(HANDSHAKE_SECONDS) as patience:
            while data:
                if not records.handshake_done:
                    records.feed(data)
                    if records.handshake_done:
                        self._handshaking.pop(task, None)
                        patience.reschedule(None)
                writer.write(data)
                await writer.drain()
                data = await reader.read(_CHUNK)
        with suppress(OSError):
            writer.write_eof()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    # The server has closed the connection: close the caller's side too, even if it still sends.
    writer.close()
