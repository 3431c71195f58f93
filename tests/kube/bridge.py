"""A fake bridge in this process, with real gRPC and mutual TLS, and a queue that the test controls."""

import datetime as dt
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb.bridge_pb2_grpc import BridgeServicer, add_BridgeServicer_to_server
from isthmus_contracts.wire.pki import Authority
from isthmus_contracts.wire.transport import SERVER_OPTIONS, server_credentials
from tests.support.ports import free_port

from .cluster import tls_secret

_DAY = dt.timedelta(days=1)
_Context = Any


class FakeBridge(BridgeServicer):
    """Fake bridge that records the requests it receives."""

    def __init__(self) -> None:
        self.port = free_port()
        self.pools: dict[str, pb.Pool] = {}
        self.requests: list[pb.EnsurePoolRequest] = []
        self.cancelled: list[str] = []
        self.renewed: dict[str, pb.RenewCredentialsRequest] = {}
        self.ahead = 0.0  # offset of its clock, in seconds
        self.get_calls = 0  # number of GetPool calls
        self.deny = ""
        self.signing_root = ""  # of the site's party, fake
        self._lock = threading.Lock()
        self._server: grpc.Server | None = None
        self.new_certificates()

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def new_certificates(self) -> None:
        """Create a CA and certificates; the bridge uses them after its next start."""
        authority = Authority.create("site", _DAY)
        self._server_side = authority.issue("bridge", _DAY, hosts=["127.0.0.1"])
        self._client_side = authority.issue("operator", _DAY, uris=["isthmus://operator/test"])

    def up(self) -> None:
        """Start serving."""
        self._server = grpc.server(ThreadPoolExecutor(4), options=SERVER_OPTIONS)
        add_BridgeServicer_to_server(self, self._server)
        self._server.add_secure_port(f"127.0.0.1:{self.port}", server_credentials(self._server_side))
        self._server.start()

    def down(self) -> None:
        """Stop answering."""
        if self._server is not None:
            self._server.stop(0).wait()
            self._server = None

    def secret(self) -> dict[str, Any]:
        """Return a Secret with the operator's certificate."""
        return tls_secret("bridge", self._client_side.files())

    def site(self, namespace: str, **spec: Any) -> dict[str, Any]:
        """Return the HPCSite. It is named like the namespace that may use it."""
        return {
            "apiVersion": "isthmus.dev/v1alpha1",
            "kind": "HPCSite",
            "metadata": {"name": namespace},
            "spec": {
                "endpoint": f"127.0.0.1:{self.port}",
                "tls": {"secretRef": {"name": "bridge", "namespace": namespace}},
                "allowedNamespaces": [namespace],
                **spec,
            },
        }

    @staticmethod
    def pool(namespace: str, replicas: int = 2) -> dict[str, Any]:
        """Return a pool at this site."""
        return {"name": "lumi", "replicas": replicas, "hpc": {"siteRef": {"name": namespace}, "environment": "py"}}

    def move(self, phase: int, **changes: Any) -> None:
        """Change every pool that has not ended."""
        ended = (pb.Pool.SUCCEEDED, pb.Pool.FAILED, pb.Pool.CANCELLED)
        with self._lock:
            for pool in self.pools.values():
                if pool.phase not in ended:
                    pool.phase = phase  # type: ignore[assignment]
                    for name, value in changes.items():
                        if name == "tasks":
                            del pool.tasks[:]
                            pool.tasks.extend(value)
                        else:
                            setattr(pool, name, value)

    def _now(self) -> float:
        return dt.datetime.now(dt.UTC).timestamp() + self.ahead

    def _reply(self, key: str) -> pb.Pool:
        self.pools[key].now = self._now()
        return self.pools[key]

    # -- the service

    def EnsurePool(self, request: pb.EnsurePoolRequest, context: _Context) -> pb.Pool:
        with self._lock:
            if self.deny:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, self.deny)
            self.requests.append(request)
            if request.key not in self.pools:
                count = request.spec.replicas
                self.pools[request.key] = pb.Pool(
                    key=request.key,
                    phase=pb.Pool.PENDING,
                    slurm_job_id=str(8000 + len(self.pools)),
                    desired=count,
                    queued=count,
                    reason="Resources",
                    submitted_at=self._now(),
                )
            return self._reply(request.key)

    def RenewCredentials(self, request: pb.RenewCredentialsRequest, context: _Context) -> pb.Pool:
        with self._lock:
            self.renewed[request.key] = request
            return self._reply(request.key)

    def GetPool(self, request: pb.GetPoolRequest, context: _Context) -> pb.Pool:
        with self._lock:
            self.get_calls += 1
            if request.key not in self.pools:
                context.abort(grpc.StatusCode.NOT_FOUND, "no such pool")
            return self._reply(request.key)

    def CancelPool(self, request: pb.CancelPoolRequest, context: _Context) -> pb.Pool:
        with self._lock:
            self.cancelled.append(request.key)
            pool = self.pools.setdefault(request.key, pb.Pool(key=request.key))
            pool.phase = pb.Pool.CANCELLED
            pool.queued = pool.running = 0
            return pool

    def TailLog(self, request: pb.TailLogRequest, context: _Context) -> Iterator[pb.LogChunk]:
        if request.key not in self.pools:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such pool")
        yield pb.LogChunk(data=f"task {request.index}: {request.lines} lines\n".encode())
        yield pb.LogChunk(data=b"epoch 1\n")

    def DescribeSite(self, request: pb.DescribeSiteRequest, context: _Context) -> pb.Site:
        return pb.Site(
            name="fake",
            slurm_version="24.11.5",
            cluster="fake",
            partitions=["main"],
            environments=["py"],
            signing_root=self.signing_root,
        )
