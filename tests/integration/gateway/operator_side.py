"""The operator's side of a dial-out site: the gateway, and the client that calls through it."""

import asyncio
import base64
import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isthmus_contracts.identities import operator_identity
from isthmus_contracts.wire.pki import Authority
from isthmus_operator.effects.bridge import Bridges
from isthmus_operator.effects.bridge_channels import BridgeChannels
from isthmus_operator.servers.gateway import Gateway
from isthmus_operator.state.clock import Clock
from isthmus_operator.state.job_store import SiteStore
from tests.support.ports import free_port

DAY = dt.timedelta(days=1)
SITE = "lumi"


async def until(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """Wait until the condition returns a true value, and return it."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not (answer := condition()):
        assert loop.time() < deadline, f"not within {seconds:.0f} s: {what}"
        await asyncio.sleep(0.05)
    return answer


class Kube:
    """Store of Secrets."""

    def __init__(self) -> None:
        self.secrets: dict[str, dict[str, Any]] = {}

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        return self.secrets.get(name)


class OperatorSide:
    """The gateway and the client, as the operator has them."""

    def __init__(self, tls: Path) -> None:
        self.sites = SiteStore()
        self.kube = Kube()
        self._tls = tls
        self.port = free_port()
        self.start()

    def start(self) -> None:
        """Start or restart, as a new operator would: with nothing in memory."""
        self.gateway = Gateway(lambda site: None)
        self.channels = BridgeChannels(self.kube, self.sites, self.gateway.addresses)  # type: ignore[arg-type]
        self.bridges = Bridges(self.channels, Clock())
        serving = self.gateway.serve(f"127.0.0.1:{self.port}", self._tls, self.channels.prove)
        self._task = asyncio.create_task(serving)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.bridges.close()

    def knows(self, authority: Authority) -> None:
        """Add an HPCSite that dials out, with a certificate from the site's CA for the operator."""
        files = authority.issue("prod", DAY, uris=[operator_identity("prod")]).files()
        data = {name: base64.b64encode(content).decode() for name, content in files.items()}
        self.kube.secrets["bridge"] = {"data": data}
        reference = {"secretRef": {"name": "bridge", "namespace": "system"}}
        body = {"connection": "DialOut", "tls": reference, "allowedNamespaces": ["*"]}
        self.sites.put({"metadata": {"name": SITE, "resourceVersion": "1"}, "spec": body})

    async def connected(self) -> None:
        await until(lambda: SITE in self.gateway.addresses, "the bridge is connected")
