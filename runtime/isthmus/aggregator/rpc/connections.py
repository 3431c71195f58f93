"""Limit on the connections of each certificate. Each connection takes memory, and gRPC has no limit by caller.

gRPC shows the caller and address of a call, but not its connections. A connection beyond the limit is found by its
address among the sockets of this process and shut down, which gRPC takes for a disconnect by the peer.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

from ...malloc_tuning import release_free_memory

log = logging.getLogger(__name__)

CONNECTIONS_OF_EACH = 4
"""Connections of a client: two while one replaces the other, and two half-open ones."""
MOST_SILENT = 16
"""Connections without a call so far, besides one for each client. The headers of each may occupy 20 MB."""
SILENT_SECONDS = 30.0
"""Time after which a connection without a call is ended."""
SWEEP_SECONDS = 2.0
# Sweeps that return freed memory to the system, after a connection without a call has ended.
_TRIMS = 15


class Connections:
    """Connections with at least one call, by caller, least recently used first."""

    def __init__(self, clients: int) -> None:
        """``clients``: number of clients of the job, which may all connect at the same moment."""
        self._most_silent = MOST_SILENT + clients
        self._by_caller: dict[Hashable, dict[str, None]] = {}
        self._caller_of: dict[str, Hashable] = {}
        self._silent: dict[str, float] = {}

    def admit(self, caller: Hashable, clients: int, peer: str) -> None:
        """Record a call from an address, and end the caller's connections beyond the limit.

        ``clients``: number of clients that the caller may speak for.
        """
        self._forget(peer)  # the address may belong to another caller now
        peers = self._by_caller.setdefault(caller, {})
        peers[peer] = None
        self._caller_of[peer] = caller
        if len(peers) <= CONNECTIONS_OF_EACH * clients:
            return
        for gone in peers.keys() - {peer for peer, _ in _peers()}:
            self._forget(gone)
        for oldest in list(peers)[: -CONNECTIONS_OF_EACH * clients]:
            self._forget(oldest)
            log.warning("%s has too many connections; its oldest one, from %s, is ended", caller, oldest)
            _shut_down({oldest}.__contains__)

    async def watch(self, port: int) -> None:
        """End connections to a port that have no call: those that are overdue, and the oldest if there are too many."""
        trims = 0
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            found = await asyncio.to_thread(lambda: {peer for peer, local in _peers() if local == port})
            silent = set(self._silent)
            if ended := self.overdue(found, time.monotonic()):
                log.warning("ended %d connections without a call", len(ended))
                await asyncio.to_thread(_shut_down, ended.__contains__)
            if silent - found:
                trims = _TRIMS
            if trims:
                # The memory of their headers would stay allocated in fragments, and that of later ones would add to it.
                # gRPC frees it gradually, so the trim is repeated.
                trims -= 1
                await asyncio.to_thread(release_free_memory)

    def overdue(self, found: set[str], now: float) -> set[str]:
        """Return the connections to end, of those that were ``found``. Forget connections that no longer exist."""
        for peer in self._caller_of.keys() - found:
            self._forget(peer)
        since = {peer: self._silent.get(peer, now) for peer in found - self._caller_of.keys()}
        by_age = sorted(since, key=since.__getitem__)
        ended = {peer for peer in by_age if now - since[peer] > SILENT_SECONDS}
        ended.update(by_age[: max(len(by_age) - self._most_silent, 0)])
        self._silent = {peer: when for peer, when in since.items() if peer not in ended}
        return ended

    def _forget(self, peer: str) -> None:
        caller = self._caller_of.pop(peer, None)
        if caller is not None:
            peers = self._by_caller[caller]
            del peers[peer]
            if not peers:
                del self._by_caller[caller]


def _sockets() -> Iterator[socket.socket]:
    """Yield every socket of this process, as a duplicate that is closed afterwards."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # not a socket, or closed meanwhile
            copy = os.dup(int(entry.name))
            try:
                found = socket.socket(fileno=copy)
            except OSError:
                os.close(copy)
                continue
            with found:
                if found.family in (socket.AF_INET, socket.AF_INET6):
                    yield found


def _peers() -> Iterator[tuple[str, int]]:
    """Yield the peer's address, in gRPC's notation, and the local port of every TCP connection."""
    for each in _sockets():
        with suppress(OSError):  # a listening socket
            yield _address(each), each.getsockname()[1]


def _shut_down(which: Callable[[str], bool]) -> None:
    for each in _sockets():
        with suppress(OSError):
            if which(_address(each)):
                each.shutdown(socket.SHUT_RDWR)


def _address(connection: socket.socket) -> str:
    host, port = connection.getpeername()[:2]
    host = host.removeprefix("::ffff:")
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


def peer_address(peer: str) -> str:
    """Return the address in gRPC's name of a peer, in the notation that this module compares."""
    address = unquote(peer)
    mapped = address.removeprefix("ipv6:[::ffff:")
    return address if mapped == address else f"ipv4:{mapped.replace(']', '', 1)}"
