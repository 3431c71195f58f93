"""Certificates that are renewed while a server runs, and clocks that differ."""

import asyncio
import datetime as dt
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from isthmus_contracts.wire import transport
from isthmus_contracts.wire.pki import Authority, Credentials
from isthmus_contracts.wire.transport import aio_channel, renewed_server_credentials
from tests.support import faketime

_DAY = dt.timedelta(days=1)


@pytest.fixture
def authority() -> Authority:
    return Authority.create("job", _DAY)


@pytest.fixture
async def port(authority: Authority, tmp_path: Path) -> AsyncIterator[int]:
    """Yield the port of a server whose certificate expires soon, but not before this test ends."""
    authority.issue("server", dt.timedelta(seconds=1), hosts=["127.0.0.1"]).write(tmp_path)

    async def answer(request: bytes, context: Any) -> bytes:
        return request

    server = aio.server()
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("S", {"Echo": handler}),))
    port = server.add_secure_port("127.0.0.1:0", renewed_server_credentials(tmp_path))
    await server.start()
    yield port
    await server.stop(0)


async def echo(channel: aio.Channel) -> bytes:
    return bytes(await channel.unary_unary("/S/Echo")(b"x", timeout=60))


async def test_a_renewed_certificate_costs_no_connection(authority: Authority, port: int, tmp_path: Path) -> None:
    client = authority.issue("client", _DAY, uris=["isthmus://x"])
    async with aio_channel(f"127.0.0.1:{port}", client) as kept:
        # Renew before any client has connected: none could use the first certificate, which may have expired by now.
        authority.issue("server", _DAY, hosts=["127.0.0.1"]).write(tmp_path)
        assert await echo(kept) == b"x"
        before = Credentials.read(tmp_path)
        authority.issue("server", _DAY, hosts=["127.0.0.1"]).write(tmp_path)
        assert Credentials.read(tmp_path) != before
        assert await echo(kept) == b"x"
        async with aio_channel(f"127.0.0.1:{port}", client) as fresh:
            assert await echo(fresh) == b"x"
        # Incomplete files, as in the middle of a renewal, change nothing.
        (tmp_path / "tls.key").unlink()
        async with aio_channel(f"127.0.0.1:{port}", client) as fresh:
            assert await echo(fresh) == b"x"


async def test_strangers_are_still_refused(port: int, tmp_path: Path) -> None:
    other = Authority.create("other", _DAY)
    stranger = Credentials(
        Credentials.read(tmp_path).ca, *list(vars(other.issue("c", _DAY, uris=["isthmus://x"])).values())[1:]
    )
    async with aio_channel(f"127.0.0.1:{port}", stranger) as channel:
        with pytest.raises(aio.AioRpcError):
            await echo(channel)


async def test_a_renewed_authority_and_the_earlier_one_trust_each_other(
    authority: Authority, port: int, tmp_path: Path
) -> None:
    renewed = authority.renewed(2 * _DAY)
    assert renewed.certificate != authority.certificate
    for server in (authority, renewed):
        server.issue("server", _DAY, hosts=["127.0.0.1"]).write(tmp_path)
        for client in (authority, renewed):
            async with aio_channel(f"127.0.0.1:{port}", client.issue("c", _DAY, uris=["isthmus://x"])) as channel:
                assert await echo(channel) == b"x"


_CLIENT = """
import asyncio, datetime, sys
from pathlib import Path
from isthmus_contracts.wire.pki import Credentials
from isthmus_contracts.wire.transport import aio_channel

async def main():
    async with aio_channel(sys.argv[1], Credentials.read(Path(sys.argv[2]))) as channel:
        await channel.unary_unary("/S/Echo")(b"x", timeout=60)
    print(datetime.datetime.now(datetime.UTC).isoformat())

asyncio.run(main())
"""


@pytest.mark.parametrize("hours", [-14, 14])
async def test_a_node_whose_clock_is_wrong_by_hours_connects(
    hours: int, authority: Authority, port: int, tmp_path: Path, require: Callable[[bool, str], None]
) -> None:
    """The clock shows local time as UTC, the largest error that an ordinary mistake makes."""
    require(faketime.library() is not None, "libfaketime is not installed")
    authority = authority.renewed(30 * _DAY)
    authority.issue("server", 7 * _DAY, hosts=["127.0.0.1"]).write(tmp_path)
    authority.issue("c", 7 * _DAY, uris=["isthmus://x"]).write(tmp_path / "client")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _CLIENT, f"127.0.0.1:{port}", tmp_path / "client",
        stdout=asyncio.subprocess.PIPE, env={**os.environ, **faketime.wrong_by(hours)},
    )  # fmt: skip
    said, _ = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0
    off = dt.datetime.fromisoformat(said.decode().strip()) - dt.datetime.now(dt.UTC)
    assert abs(off - dt.timedelta(hours=hours)) < dt.timedelta(minutes=10), "its clock was not wrong at all"


def test_the_option_for_calls_per_connection_is_set_once() -> None:
    """gRPC uses the first of two values of an option."""
    options = transport.server_options(calls=8)
    assert [value for name, value in options if name == "grpc.max_concurrent_streams"] == [8]
    assert dict(options).keys() == dict(transport.SERVER_OPTIONS).keys()
