"""How many connections one certificate may hold: each costs memory, and gRPC has no bound by who calls.

gRPC shows who calls, and from which address, but not its connections. One too many is found by that address among the
sockets of this process, and shut down; gRPC then sees a peer that has hung up.
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
"""Of a client: two while one replaces the other, and as many half-open ones."""
MOST_SILENT = 16
"""Connections that have not brought a call yet, beside one for each client. Each may take 20 MB by its headers."""
SILENT_SECONDS = 30.0
"""How long such a connection stays."""
SWEEP_SECONDS = 2.0
# Sweeps after one at which a connection without a call was found gone.
_TRIMS = 15


class Connections:
    """The connections that have brought a call, by who called; those used least recently come first."""

    def __init__(self, clients: int) -> None:
        """``clients``: of the job, which may all connect at the same moment."""
        self._most_silent = MOST_SILENT + clients
        self._by_caller: dict[Hashable, dict[str, None]] = {}
        self._caller_of: dict[str, Hashable] = {}
        self._silent: dict[str, float] = {}

    def admit(self, caller: Hashable, clients: int, peer: str) -> None:
        """Book a call from an address, and end the caller's connections beyond its bound.

        ``clients``: how many the caller speaks for.
        """
        self._forget(peer)  # an address may be another caller's by now
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
        """End connections to a port that bring no call: those that wait for long, and the oldest of too many."""
        trims = 0
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            found = await asyncio.to_thread(lambda: {peer for peer, local in _peers() if local == port})
            silent = set(self._silent)
            if ended := self.overdue(found, time.monotonic()):
                log.warning("%d connections that have brought no call are ended", len(ended))
                await asyncio.to_thread(_shut_down, ended.__contains__)
            if silent - found:
                trims = _TRIMS
            if trims:
                # What their headers took would lie there, in pieces, and the next ones' would come on top of it. gRPC
                # lets go of it bit by bit.
                trims -= 1
                await asyncio.to_thread(release_free_memory)

    def overdue(self, found: set[str], now: float) -> set[str]:
        """Return which of the connections that there are have to go. Those that are gone are forgotten."""
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
    """Every socket of this process, as a copy that is closed after its turn."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # no socket, or gone meanwhile
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
    """Every TCP connection: the peer's address as gRPC writes it, and the port on our side."""
    for each in _sockets():
        with suppress(OSError):  # it listens
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
    """Return gRPC's name of a peer in the form that is compared here."""
    address = unquote(peer)
    mapped = address.removeprefix("ipv6:[::ffff:")
    return address if mapped == address else f"ipv4:{mapped.replace(']', '', 1)}"
