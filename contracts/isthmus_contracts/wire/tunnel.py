"""Common part of both ends of a dial-out tunnel: maps sockets to numbered connections in one stream."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from ..pb import gateway_pb2 as pb

PROTOCOL = 1
# The operator has one connection to each bridge, and a second one while it changes certificates.
MAX_CONNECTIONS = 8
CHUNK = 64 << 10
MAX_FRAME = CHUNK + 1024
"""Maximum length of a message in the stream."""

Write = Callable[[pb.Frame], Awaitable[None]]


class TunnelError(Exception):
    """Violation of the protocol by the other end."""


class Connections:
    """Connections in one tunnel, at one of its ends.

    The stream provides back-pressure: while the other end is slow, ``write`` waits and the socket is not read; while a
    local socket is slow, :meth:`receive` waits and the stream is not read.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        # A gRPC stream takes one message at a time.
        self._turn = asyncio.Lock()
        self._writers: dict[int, asyncio.StreamWriter] = {}

    def __len__(self) -> int:
        return len(self._writers)

    def __contains__(self, number: int) -> bool:
        return number in self._writers

    async def send(self, frame: pb.Frame) -> None:
        """Write a frame to the stream."""
        async with self._turn:
            await self._write(frame)

    def add(self, number: int, writer: asyncio.StreamWriter) -> None:
        """Pass data that arrives for this number to the socket."""
        self._writers[number] = writer

    async def pump(self, number: int, reader: asyncio.StreamReader) -> None:
        """Forward data from the socket until either end closes the connection."""
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                await self.send(pb.Frame(data=pb.Data(connection=number, content=data)))
        if self._end(number):
            await self.send(pb.Frame(close=number))

    async def receive(self, frame: pb.Frame) -> None:
        """Handle a frame of a connection. Raises :class:`TunnelError`."""
        kind = frame.WhichOneof("kind")
        if kind == "close":
            self._end(frame.close)
            return
        if kind != "data":
            raise TunnelError(f"a frame of the kind {kind} is out of place")
        if len(frame.data.content) > CHUNK:
            raise TunnelError(f"{len(frame.data.content)} bytes in one frame; {CHUNK} are allowed")
        writer = self._writers.get(frame.data.connection)
        if writer is None:
            return  # already closed at this end; the other end does not know it yet
        writer.write(frame.data.content)
        # The pump of a broken socket ends.
        with suppress(OSError):
            await writer.drain()

    def close(self) -> None:
        """Close all connections: the tunnel has ended."""
        for number in list(self._writers):
            self._end(number)

    def _end(self, number: int) -> bool:
        writer = self._writers.pop(number, None)
        if writer is None:
            return False
        writer.close()
        return True
