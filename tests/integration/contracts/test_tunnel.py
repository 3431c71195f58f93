"""One end of a tunnel: sockets joined to numbered connections in a stream."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from isthmus_contracts.pb import gateway_pb2 as pb
from isthmus_contracts.wire.tunnel import CHUNK, Connections, TunnelError


class Stream:
    """Stream that records the written frames, and can stop accepting them."""

    def __init__(self) -> None:
        self.frames: list[pb.Frame] = []
        self.flows = asyncio.Event()
        self.flows.set()

    async def write(self, frame: pb.Frame) -> None:
        await self.flows.wait()
        self.frames.append(frame)


async def until(condition: object) -> None:
    async with asyncio.timeout(30):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def socket_pair(folder: Path) -> AsyncIterator[tuple[asyncio.StreamReader, ...]]:
    """Return (reader, writer) of the local end, then of the remote end."""
    arrived: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.put_nowait((reader, writer))

    server = await asyncio.start_unix_server(accept, folder / "s", limit=CHUNK)
    far = await asyncio.open_unix_connection(folder / "s")
    here = await arrived.get()
    yield (*here, *far)  # type: ignore[misc]
    here[1].close()
    far[1].close()
    server.close()


async def test_bytes_go_both_ways_and_the_end_is_sent_once(tmp_path: Path) -> None:
    stream = Stream()
    connections = Connections(stream.write)
    async with socket_pair(tmp_path) as (reader, writer, far_reader, far_writer):
        connections.add(7, writer)  # type: ignore[arg-type]
        pump = asyncio.create_task(connections.pump(7, reader))
        far_writer.write(b"up")  # type: ignore[attr-defined]
        await until(lambda: stream.frames == [pb.Frame(data=pb.Data(connection=7, content=b"up"))])
        await connections.receive(pb.Frame(data=pb.Data(connection=7, content=b"down")))
        assert await far_reader.readexactly(4) == b"down"
        far_writer.close()  # type: ignore[attr-defined]
        await asyncio.wait_for(pump, 30)
    assert stream.frames[1:] == [pb.Frame(close=7)]
    # Frames that were already on the way are dropped.
    await connections.receive(pb.Frame(data=pb.Data(connection=7, content=b"late")))
    await connections.receive(pb.Frame(close=7))


async def test_a_close_from_the_other_end_is_not_answered(tmp_path: Path) -> None:
    stream = Stream()
    connections = Connections(stream.write)
    async with socket_pair(tmp_path) as (reader, writer, far_reader, _):
        connections.add(1, writer)  # type: ignore[arg-type]
        pump = asyncio.create_task(connections.pump(1, reader))
        await connections.receive(pb.Frame(close=1))
        assert await asyncio.wait_for(far_reader.read(), 30) == b""
        await asyncio.wait_for(pump, 30)
    assert stream.frames == [] and len(connections) == 0


async def test_a_stream_that_does_not_flow_stops_the_sender(tmp_path: Path) -> None:
    stream = Stream()
    stream.flows.clear()
    connections = Connections(stream.write)
    async with socket_pair(tmp_path) as (reader, writer, _, far_writer):
        connections.add(1, writer)  # type: ignore[arg-type]
        pump = asyncio.create_task(connections.pump(1, reader))
        content = bytes(64 * CHUNK)
        far_writer.write(content)  # type: ignore[attr-defined]
        drained = asyncio.create_task(far_writer.drain())  # type: ignore[attr-defined]
        done, _pending = await asyncio.wait((drained, pump), timeout=1)
        assert not done, "somebody holds 4 MiB for a stream that is stuck"
        stream.flows.set()
        await asyncio.wait_for(drained, 30)
        await until(lambda: sum(len(frame.data.content) for frame in stream.frames) == len(content))
        assert max(len(frame.data.content) for frame in stream.frames) <= CHUNK
        pump.cancel()


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (pb.Frame(hello=pb.Hello(protocol=1, site="x")), "kind hello is out of place"),
        (pb.Frame(open=1), "kind open is out of place"),
        (pb.Frame(), "kind None is out of place"),
        (pb.Frame(data=pb.Data(connection=1, content=bytes(CHUNK + 1))), f"{CHUNK + 1} bytes in one frame"),
    ],
    ids=["hello", "open", "empty", "long"],
)
async def test_unexpected_frames_end_the_tunnel(frame: pb.Frame, says: str) -> None:
    with pytest.raises(TunnelError, match=says):
        await Connections(Stream().write).receive(frame)
