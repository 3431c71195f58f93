"""Tests of the gateway over real gRPC and TLS, with correct and faulty bridges."""

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus_contracts.pb import gateway_pb2 as pb
from isthmus_contracts.pb.gateway_pb2_grpc import GatewayStub
from isthmus_contracts.wire.pki import Authority
from isthmus_contracts.wire.transport import aio_public_channel
from isthmus_contracts.wire.tunnel import CHUNK, MAX_CONNECTIONS, PROTOCOL
from isthmus_operator.effects.bridge_channels import BridgeError
from isthmus_operator.servers import gateway as module
from isthmus_operator.servers.gateway import Gateway
from isthmus_operator.state.observed import ProblemKind

DAY = dt.timedelta(days=1)


@dataclass
class World:
    """A gateway with a configurable result of its proof."""

    gateway: Gateway
    authority: Authority
    changed: list[str] = field(default_factory=list)
    problem: BridgeError | None = None
    proof: asyncio.Event = field(default_factory=asyncio.Event)

    async def prove(self, site: str, address: str) -> None:
        await self.proof.wait()
        if self.problem is not None:
            raise self.problem

    @asynccontextmanager
    async def dial(self) -> AsyncIterator[Any]:
        """Open a stream to the gateway."""
        channel = aio_public_channel(f"127.0.0.1:{self.gateway.port}", self.authority.certificate, "gateway.example")
        try:
            yield GatewayStub(channel).Connect()
        finally:
            await channel.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    authority = Authority.create("gateway CA", DAY)
    authority.issue("gateway", DAY, hosts=["gateway.example"]).write(tmp_path)
    changed: list[str] = []
    one = World(Gateway(changed.append), authority, changed)
    one.proof.set()
    task = asyncio.create_task(one.gateway.serve("127.0.0.1:0", tmp_path, one.prove))
    await until(lambda: one.gateway.port or task.done())
    yield one
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def hello(site: str = "lumi", protocol: int = PROTOCOL) -> pb.Frame:
    return pb.Frame(hello=pb.Hello(protocol=protocol, site=site, version="1"))


async def connected(world: World, call: Any, site: str = "lumi") -> None:
    before = world.gateway.addresses.get(site)
    await call.write(hello(site))
    assert (await asyncio.wait_for(call.read(), 60)).HasField("welcome")
    # It is registered just after its welcome.
    await until(lambda: world.gateway.addresses.get(site, before) != before)


async def end(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return how the gateway ended the stream."""
    async with asyncio.timeout(60):
        return await call.code(), await call.details()


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (pb.Frame(data=pb.Data(connection=1, content=b"x")), "must be a hello"),
        (pb.Frame(open=1), "must be a hello"),
        (hello(protocol=2), "the gateway supports protocol 1, the bridge 2"),
        (hello(site=""), "not a valid HPCSite name"),
        (hello(site="../x"), "not a valid HPCSite name"),
    ],
    ids=["data", "open", "protocol", "nameless", "path"],
)
async def test_a_malformed_first_frame_is_refused(world: World, frame: pb.Frame, says: str) -> None:
    async with world.dial() as call:
        await call.write(frame)
        code, details = await end(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and says in details
    assert world.gateway.addresses == {} and world.changed == []


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (hello(), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.Frame(welcome=pb.Welcome()), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.Frame(open=5), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.Frame(data=pb.Data(connection=1, content=bytes(CHUNK + 1))), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.Frame(data=pb.Data(connection=1, content=bytes(8 << 20))), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
    ids=["second-hello", "welcome", "open", "long-frame", "huge-message"],
)
async def test_a_bridge_that_breaks_the_protocol_loses_its_tunnel(
    world: World, frame: pb.Frame, code: grpc.StatusCode
) -> None:
    async with world.dial() as call:
        await connected(world, call)
        assert list(world.gateway.addresses) == ["lumi"]
        await call.write(frame)
        assert (await end(call))[0] is code
        await until(lambda: not world.gateway.addresses)
    assert world.changed == ["lumi", "lumi"]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ProblemKind.DENIED, grpc.StatusCode.PERMISSION_DENIED),
        (ProblemKind.UNREACHABLE, grpc.StatusCode.UNAVAILABLE),
    ],
    ids=["not-it", "no-secret"],
)
async def test_a_bridge_without_a_proof_never_connects(world: World, kind: ProblemKind, code: grpc.StatusCode) -> None:
    async with world.dial() as first, world.dial() as second:
        await connected(world, first)
        address = world.gateway.addresses["lumi"]
        world.problem = BridgeError(kind, "the bridge does not prove that it is lumi")
        await second.write(hello())
        assert await end(second) == (code, "the bridge does not prove that it is lumi")
        assert world.gateway.addresses == {"lumi": address}, "the tunnel that is there is not disturbed"
        assert not first.done()


async def test_a_newer_tunnel_takes_the_older_ones_place(world: World) -> None:
    async with world.dial() as first, world.dial() as second, world.dial() as other:
        await connected(world, other, "leonardo")
        await connected(world, first)
        old = world.gateway.addresses["lumi"]
        await connected(world, second)
        assert (await end(first))[0] is grpc.StatusCode.ABORTED
        assert world.gateway.addresses["lumi"] != old
        assert not second.done() and not other.done()
        world.gateway.drop("lumi")
        code, details = await end(second)
        assert code is grpc.StatusCode.ABORTED and "no longer dials out" in details
        await until(lambda: list(world.gateway.addresses) == ["leonardo"])


async def test_an_excess_caller_replaces_the_oldest_unproven_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_UNPROVEN", 2)
    world.proof.clear()
    async with AsyncExitStack() as stack:
        silent = await stack.enter_async_context(world.dial())
        await until(lambda: len(world.gateway._exited_without_proof) == 1)
        slow = await stack.enter_async_context(world.dial())
        await slow.write(hello("leonardo"))
        await until(lambda: len(world.gateway._exited_without_proof) == 2)
        third = await stack.enter_async_context(world.dial())
        await third.write(hello("snellius"))
        assert (await end(silent))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        honest = await stack.enter_async_context(world.dial())
        await honest.write(hello())
        assert (await end(slow))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(world.gateway._exited_without_proof) == 2
        world.proof.set()
        for call in (third, honest):
            assert (await asyncio.wait_for(call.read(), 60)).HasField("welcome")
        await until(lambda: not world.gateway._exited_without_proof)


async def test_a_silent_stranger_is_disconnected(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HELLO_SECONDS", 0.1)
    async with world.dial() as call:
        await call.wait_for_connection()
        assert (await end(call))[0] is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_connections_are_numbered_limited_and_closed_with_the_tunnel(world: World) -> None:
    async with world.dial() as call:
        await connected(world, call)
        path = world.gateway.addresses["lumi"].removeprefix("unix:")
        ends = []
        for number in range(1, MAX_CONNECTIONS + 1):
            ends.append(await asyncio.open_unix_connection(path))
            frame = await asyncio.wait_for(call.read(), 60)
            assert frame == pb.Frame(open=number)
        one_more, _ = await asyncio.open_unix_connection(path)
        assert await asyncio.wait_for(one_more.read(), 60) == b""
        await call.write(pb.Frame(data=pb.Data(connection=2, content=b"hi")))
        assert await asyncio.wait_for(ends[1][0].readexactly(2), 60) == b"hi"
        ends[2][1].close()
        assert await asyncio.wait_for(call.read(), 60) == pb.Frame(close=3)
        call.cancel()
        assert await asyncio.wait_for(ends[0][0].read(), 60) == b""
    await until(lambda: not Path(path).exists())
