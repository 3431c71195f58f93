"""Channels to the sites' bridges: direct ones, and those through tunnels of bridges that dialled the gateway."""

import asyncio
import hashlib
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from grpc import aio

from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.api.hpc_site import HpcSiteSpec
from isthmus_contracts.pb.bridge_pb2_grpc import BridgeStub
from isthmus_contracts.wire.pki import Credentials, expiry
from isthmus_contracts.wire.transport import aio_channel

from ..metrics import SITE_CERTIFICATE_EXPIRY
from ..state.job_store import SiteStore
from ..state.observed import ProblemKind
from .certificates import load_credentials
from .kube import Kube, KubeError

if TYPE_CHECKING:
    from isthmus_contracts.pb.bridge_pb2_grpc import BridgeAsyncStub

# A changed Secret is noticed within this time.
_CREDENTIALS_SECONDS = 60.0
_PROOF_SECONDS = 10.0
CALL_SECONDS = 20.0


class BridgeError(Exception):
    """A call to a site failed. ``reason``: for a condition; by default it follows from ``kind``."""

    def __init__(self, kind: ProblemKind, message: str, reason: Reason | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        denied = kind is ProblemKind.DENIED
        self.reason = reason or (Reason.POLICY_DENIED if denied else Reason.SITE_UNREACHABLE)


class NotConnectedError(BridgeError):
    """The site's bridge dials out and has no tunnel to the gateway."""

    def __init__(self, message: str) -> None:
        super().__init__(ProblemKind.UNREACHABLE, message, Reason.SITE_NOT_CONNECTED)


@dataclass
class _Channel:
    """An open channel to one bridge."""

    identity: str  # of address, Secret and credentials
    checked: float
    channel: aio.Channel
    stub: "BridgeAsyncStub"


class BridgeChannels:
    """Open channels to bridges, one per site."""

    def __init__(self, kube: Kube, sites: SiteStore, tunnels: Mapping[str, str] | None) -> None:
        """``tunnels``: by site, the address of a socket that leads into its tunnel; None if no gateway runs."""
        self._kube = kube
        self._sites = sites
        self._tunnels = tunnels
        self._channels: dict[str, _Channel] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    async def stub(self, site: str) -> "BridgeAsyncStub":
        """Return a stub for the site's bridge. Raises :class:`BridgeError`."""
        async with self._locks.setdefault(site, asyncio.Lock()):
            spec = self._sites.specs.get(site)
            if spec is None:
                raise BridgeError(ProblemKind.UNREACHABLE, f"there is no HPCSite {site}")
            place = self._place(site, spec)
            open_channel = self._channels.get(site)
            same = open_channel is not None and open_channel.identity.startswith(_label(place, spec))
            if open_channel is not None and same and time.monotonic() - open_channel.checked < _CREDENTIALS_SECONDS:
                return open_channel.stub
            credentials = await self._credentials(spec)
            identity = _label(place, spec) + hashlib.sha256(b"".join(credentials.files().values())).hexdigest()
            if open_channel is None or open_channel.identity != identity:
                if open_channel is not None:
                    self._retire(open_channel)
                channel = aio_channel(place, credentials, spec.bridge_name(site))
                with suppress(ValueError):  # not a certificate: the call will report it
                    SITE_CERTIFICATE_EXPIRY.labels(site).set(expiry(credentials.certificate).timestamp())
                stub: Any = BridgeStub(channel)
                open_channel = self._channels[site] = _Channel(identity, 0.0, channel, stub)
            open_channel.checked = time.monotonic()
            return open_channel.stub

    async def prove(self, site: str, address: str) -> None:
        """Verify by TLS that an address leads to the site's own bridge. Raises :class:`BridgeError`."""
        spec = self._sites.specs.get(site)
        if spec is None or spec.connection != "DialOut":
            # The same message for both cases, since the caller is not authenticated yet.
            raise BridgeError(ProblemKind.DENIED, f"no HPCSite {site!r} has connection: DialOut")
        credentials = await self._credentials(spec)
        name = spec.bridge_name(site)
        channel = aio_channel(address, credentials, name)
        try:
            async with asyncio.timeout(_PROOF_SECONDS):
                state = channel.get_state(try_to_connect=True)
                while state is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        raise ConnectionError
                    await channel.wait_for_state_change(state)
                    state = channel.get_state(try_to_connect=True)
        except (TimeoutError, ConnectionError):
            message = f"the bridge does not prove that it is {site}: it needs a certificate of the site's CA for {name}"
            raise BridgeError(ProblemKind.DENIED, message) from None
        finally:
            await channel.close()

    async def forget(self, site: str) -> None:
        """Close the channel of a site that is gone."""
        with suppress(KeyError):  # it was never called
            SITE_CERTIFICATE_EXPIRY.remove(site)
        open_channel = self._channels.pop(site, None)
        if open_channel is not None:
            self._retire(open_channel)

    def _retire(self, open_channel: _Channel) -> None:
        """Close a channel after the calls of other jobs in it have ended.

        Cancelled calls would look as if the operator itself were stopping.
        """
        task = asyncio.create_task(open_channel.channel.close(CALL_SECONDS))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def close(self) -> None:
        """Close every channel."""
        for open_channel in list(self._channels.values()):
            await open_channel.channel.close()
        self._channels.clear()

    def _place(self, site: str, spec: HpcSiteSpec) -> str:
        if spec.endpoint is not None:
            return spec.endpoint
        if self._tunnels is None:
            message = (
                f"{site} dials out, and this operator runs no gateway: set --gateway (the chart's gateway.enabled)"
            )
            raise NotConnectedError(message)
        if site not in self._tunnels:
            message = f"{site} dials out, and no bridge of it is connected to the gateway"
            raise NotConnectedError(message)
        return self._tunnels[site]

    async def _credentials(self, spec: HpcSiteSpec) -> Credentials:
        ref = spec.tls.secret_ref
        try:
            secret = await self._kube.get("Secret", ref.namespace, ref.name)
        except KubeError as error:
            message = f"Secret {ref.namespace}/{ref.name} cannot be read: {error}"
            raise BridgeError(ProblemKind.UNREACHABLE, message, Reason.CREDENTIALS_MISSING) from error
        credentials = load_credentials(secret)
        if credentials is None:
            what = "is missing" if secret is None else "lacks ca.crt, tls.crt or tls.key"
            message = f"Secret {ref.namespace}/{ref.name} {what}"
            raise BridgeError(ProblemKind.UNREACHABLE, message, Reason.CREDENTIALS_MISSING)
        return credentials


def _label(place: str, spec: HpcSiteSpec) -> str:
    secret = spec.tls.secret_ref
    return f"{place} {spec.tls.server_name or ''} {secret.namespace}/{secret.name} "
