"""The operator's gateway in its own thread, for tests of a bridge that cannot be dialled."""

import asyncio
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from isthmus_contracts.wire.pki import Authority
from tests.integration.gateway.operator_side import DAY, SITE, OperatorSide

from .slurm_site import Site, until


class Gateway:
    """Gateway that accepts the bridge of one site."""

    def __init__(self, folder: Path) -> None:
        self._authority = Authority.create("gateway CA", DAY)
        self._authority.issue("gateway", DAY, hosts=["localhost"]).write(folder / "gateway")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._side = self._do(self._make(folder / "gateway")).result(60)

    def admit(self, site: Site) -> None:
        """Accept the site's bridge, and configure it to dial the gateway."""
        self._side.knows(site.authority)
        site.name = f"{SITE}.bridge.isthmus.dev"
        site.authority.issue("bridge", DAY, hosts=[site.name]).write(site.folder / "tls")
        authority = site.folder / "tls" / "gateway-ca.crt"
        authority.write_bytes(self._authority.certificate)
        site.settings["gateways"] = [{"address": f"localhost:{self._side.port}", "site": SITE}]
        del site.settings["listen"]

    def connected(self) -> str:
        """Wait for the bridge to connect, and return the address at which it can be reached."""
        address = until(lambda: self._side.gateway.addresses.get(SITE), "the bridge is connected", 120)
        assert isinstance(address, str)
        return address

    def close(self) -> None:
        """Stop the gateway."""
        self._do(self._side.stop()).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _make(self, tls: Path) -> OperatorSide:
        return OperatorSide(tls)

    def _do(self, coroutine: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
