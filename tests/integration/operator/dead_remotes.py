"""Remote parties that accept calls and never respond: real gRPC servers with mutual TLS."""

import asyncio
import base64
import datetime as dt
import itertools
from typing import Any

from grpc import aio

from isthmus_contracts import identities as ids
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb.bridge_pb2_grpc import BridgeServicer, add_BridgeServicer_to_server
from isthmus_contracts.pb.federation_pb2_grpc import ObserverServicer, add_ObserverServicer_to_server
from isthmus_contracts.wire.pki import Authority, Credentials
from isthmus_contracts.wire.transport import SERVER_OPTIONS, server_credentials

from .fake_api_server import ApiServer
from .operator_process import until

_DAY = dt.timedelta(days=1)


class DeadBridge(BridgeServicer):
    """A bridge that accepts every call and never responds."""

    def __init__(self, describes_itself: bool = False) -> None:
        self.describes_itself = describes_itself
        self.calls = 0

    async def _never(self, *_: Any) -> Any:
        self.calls += 1
        await asyncio.get_running_loop().create_future()

    async def DescribeSite(self, request: Any, context: Any) -> Any:
        if not self.describes_itself:
            await self._never()
        return pb.Site(name="dead")

    EnsurePool = GetPool = CancelPool = RenewCredentials = ShrinkPool = TailLog = _never  # type: ignore


class DeadObserver(ObserverServicer):
    """An aggregator that never responds."""

    async def _never(self, *_: Any) -> Any:
        await asyncio.get_running_loop().create_future()

    GetStatus = WatchStatus = WaitFor = _never  # type: ignore


def dead_site(api: ApiServer, name: str, bridge: DeadBridge) -> None:
    """Serve a dead bridge, and create its HPCSite."""
    authority = Authority.create("site", _DAY)
    client = authority.issue("operator", _DAY, uris=["isthmus://operator/test"])
    tls = server_credentials(authority.issue("bridge", _DAY, hosts=["127.0.0.1"]))

    async def serve() -> int:
        server = aio.server(options=SERVER_OPTIONS)
        add_BridgeServicer_to_server(bridge, server)
        port = server.add_secure_port("127.0.0.1:0", tls)
        await server.start()
        api.servers.append(server)
        return port

    port = api.run(serve()).result(30)
    data = {key: base64.b64encode(value).decode() for key, value in client.files().items()}
    api.put("secrets", {"metadata": {"name": f"bridge-{name}"}, "data": data}, "sites")
    secret = {"name": f"bridge-{name}", "namespace": "sites"}
    spec = {"endpoint": f"127.0.0.1:{port}", "tls": {"secretRef": secret}, "allowedNamespaces": ["*"]}
    api.put("hpcsites", {"metadata": {"name": name}, "spec": spec})


def silent_aggregators(api: ApiServer, namespace: str) -> None:
    """Let each new aggregator of a namespace accept TLS with its own certificate, and never respond."""
    addresses = (f"127.83.{number // 250}.{number % 250 + 1}" for number in itertools.count())

    async def started(pod: dict[str, Any]) -> str:
        metadata = pod["metadata"]
        if metadata["namespace"] != namespace or not metadata["name"].endswith("-aggregator"):
            return "127.0.0.1"
        secret = api.objects["secrets", namespace, f"{metadata['name']}-tls"]
        files = {key: base64.b64decode(value) for key, value in secret["data"].items()}
        credentials = Credentials(files[ids.CA_FILE], files[ids.CERTIFICATE_FILE], files[ids.KEY_FILE])
        address = next(addresses)
        server = aio.server()
        add_ObserverServicer_to_server(DeadObserver(), server)
        server.add_secure_port(f"{address}:{ids.AGGREGATOR_PORT}", server_credentials(credentials))
        await server.start()
        api.servers.append(server)
        return address

    api.pod_started = started


def hpc_job(site: str) -> dict[str, Any]:
    """Return the changes of a spec for a job with one pool at a site."""
    return {"pools": [{"name": "lumi", "replicas": 1, "hpc": {"siteRef": {"name": site}, "environment": "py"}}]}


def made(api: ApiServer, namespace: str, count: int, condition: str) -> None:
    """Wait until a number of jobs of a namespace have a condition."""

    def enough() -> bool:
        jobs = api.items("federatedjobs", namespace)
        return sum(api.condition(namespace, job["metadata"]["name"], condition) != "" for job in jobs) >= count

    until(enough, f"{count} jobs in {namespace} have {condition}", 300)
