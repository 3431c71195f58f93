"""The client of the API server: plain JSON requests in threads, because the client library blocks.

The library's typed models are not used: they cost memory, and all objects here are mappings anyway.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode

import urllib3
from kubernetes import client, config
from kubernetes.client.rest import should_bypass_proxies
from urllib3.exceptions import HTTPError

from isthmus_contracts import identities as ids

from ..fair_semaphore import OVERFLOW, FairSemaphore
from ..metrics import API_REQUESTS
from ..state.clock import Clock

FIELD_MANAGER = ids.MANAGED_BY
_MERGE_PATCH = "application/merge-patch+json"
_APPLY_PATCH = "application/apply-patch+yaml"

_PLURALS = {
    "Pod": "pods",
    "Service": "services",
    "Secret": "secrets",
    "ConfigMap": "configmaps",
    "PersistentVolumeClaim": "persistentvolumeclaims",
    "Event": "events",
    "Namespace": "namespaces",
    "Node": "nodes",
    "NetworkPolicy": "networkpolicies",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "FederatedJob": "federatedjobs",
    "HPCSite": "hpcsites",
}
_GROUPS = {"NetworkPolicy": "networking.k8s.io/v1", "PodDisruptionBudget": "policy/v1"}
# The pauses grow from the usual Retry-After of one second; together they take about half a minute.
_THROTTLED_ATTEMPTS = 7
_LONGEST_RETRY_AFTER = 10.0
_PAGE = 200  # objects
_OUR_KINDS = ("FederatedJob", "HPCSite")


class KubeError(Exception):
    """A request to the API server failed. ``code`` is 0 if there was no response."""

    def __init__(self, code: int, message: str, reason: str = "", retry_after: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.retry_after = _seconds(retry_after)
        """The delay that the API server asks for before a retry. Seconds."""

    @property
    def definite(self) -> bool:
        """True if the request had no effect, and would have none if it were repeated at once."""
        return 400 <= self.code < 500 and self.code not in (408, 429)

    @property
    def answered(self) -> bool:
        """True if the API server rejected the request, itself or by an admission webhook (500).

        False if it did not respond or asked for a later retry.
        """
        return self.code >= 400 and self.code not in (408, 429)


def path(kind: str, namespace: str = "", name: str = "", subresource: str = "") -> str:
    """Return the URL path of an object or a collection."""
    group = ids.API_VERSION if kind in _OUR_KINDS else _GROUPS.get(kind)
    root = f"/apis/{group}" if group else "/api/v1"
    parts = [root, f"namespaces/{namespace}" if namespace else "", _PLURALS[kind], name, subresource]
    return "/".join(part for part in parts if part)


class Kube:
    """Requests to the API server."""

    def __init__(
        self,
        configuration: client.Configuration,
        concurrency: int,
        timeout: float,
        clock: Clock,
        reload: Callable[[], client.Configuration] | None = None,
    ) -> None:
        """``clock`` follows the API server's time. ``reload`` reads the credentials again."""
        self.clock = clock
        self._configuration = configuration
        self._reload = reload
        self._slots = FairSemaphore(concurrency)
        self._pool = connections(configuration, OVERFLOW * concurrency)
        self._timeout = timeout
        self._policy = _GROUPS["PodDisruptionBudget"]
        self._threads = ThreadPoolExecutor(OVERFLOW * concurrency, thread_name_prefix="kube")

    @classmethod
    def connect(cls, concurrency: int, timeout: float, clock: Clock) -> "Kube":
        """Connect with the pod's service account or, outside a cluster, the kubeconfig."""
        return cls(_configuration(), concurrency, timeout, clock, _configuration)

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def probe(self, where: str) -> None:
        """Raise :class:`KubeError` unless a GET of the path succeeds."""
        await self._request("GET", where)

    async def discover(self) -> None:
        """Detect the API version of PodDisruptionBudgets, which is another one before Kubernetes 1.21."""
        try:
            await self.probe(f"/apis/{self._policy}")
        except KubeError as error:
            if error.code != 404:
                raise
            self._policy = "policy/v1beta1"

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        """Return an object, or None if it does not exist."""
        try:
            return await self._request("GET", path(kind, namespace, name))
        except KubeError as error:
            if error.code == 404:
                return None
            raise

    async def list(self, kind: str, namespace: str, labels: str) -> dict[str, Any]:
        """Return the list of objects with these labels."""
        return await self._request("GET", path(kind, namespace), query={"labelSelector": labels})

    async def all(self, kind: str, namespace: str) -> AsyncIterator[dict[str, Any]]:
        """Yield every object of a kind, in one namespace or (empty) in all, page by page."""
        query = {"limit": str(_PAGE)}
        while True:
            page = await self._request("GET", path(kind, namespace), query=query)
            for body in page.get("items") or ():
                yield body
            onward = (page.get("metadata") or {}).get("continue")
            if not onward:
                return
            query = {**query, "continue": str(onward)}

    async def create(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Create an object."""
        where = path(body["kind"], body["metadata"].get("namespace", ""))
        return await self._request("POST", where, body, query={"fieldManager": FIELD_MANAGER})

    async def apply(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Apply an object on the server's side."""
        if body["apiVersion"] == _GROUPS["PodDisruptionBudget"]:
            body = {**body, "apiVersion": self._policy}
        metadata = body["metadata"]
        where = path(body["kind"], metadata.get("namespace", ""), metadata["name"])
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return await self._request("PATCH", where, body, query, _APPLY_PATCH)

    async def patch(
        self, kind: str, namespace: str, name: str, body: Mapping[str, Any], subresource: str = ""
    ) -> dict[str, Any]:
        """Apply a JSON merge patch to an object."""
        where = path(kind, namespace, name, subresource)
        return await self._request("PATCH", where, body, {"fieldManager": FIELD_MANAGER}, _MERGE_PATCH)

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """Delete the object with that uid, if it still exists."""
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        try:
            await self._request("DELETE", path(kind, namespace, name), body)
        except KubeError as error:
            # 409: another object has the name by now.
            if error.code not in (404, 409):
                raise

    async def _request(
        self,
        method: str,
        where: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        # Shared by namespace, so that slow admission webhooks of one do not delay the others.
        loop, group, attempt = asyncio.get_running_loop(), _namespace(where), 0
        while True:
            await self._slots.acquire(group)
            try:
                return await loop.run_in_executor(self._threads, self._send, method, where, body, query, content_type)
            except KubeError as error:
                # A throttled request had no effect. Retrying it here is cheaper than repeating the reconciliation.
                if error.code != 429 or attempt == _THROTTLED_ATTEMPTS:
                    raise
                pause = error.retry_after * 1.5**attempt
            finally:
                self._slots.release(group)
            await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - so that not all come at once
            attempt += 1

    def _send(
        self,
        method: str,
        where: str,
        body: Mapping[str, Any] | None,
        query: Mapping[str, str] | None,
        content_type: str,
    ) -> dict[str, Any]:
        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": ids.MANAGED_BY}
        configuration = self._configuration
        # Also refreshes a rotated token.
        token = configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        if token:
            headers["Authorization"] = token
        where = where.replace(f"/apis/{_GROUPS['PodDisruptionBudget']}/", f"/apis/{self._policy}/")
        url = configuration.host.rstrip("/") + where + (f"?{urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        sent = time.monotonic()
        try:
            answer = self._pool.request(method, url, body=data, headers=headers, timeout=self._timeout, retries=False)
        except (HTTPError, OSError) as error:
            API_REQUESTS.labels(method, "none").inc()
            raise KubeError(0, f"no response from the API server: {error}") from error
        API_REQUESTS.labels(method, str(answer.status)).inc()
        self.clock.observe_date(answer.headers.get("Date"), sent)
        if answer.status == 401 and self._reload is not None:
            # The library refreshes its token by the wall clock, which may have been set back.
            self._configuration = self._reload()
        content = _parsed(answer.data)
        if answer.status >= 400:
            message = str(content.get("message") or answer.data[:200].decode("utf-8", "replace") or answer.reason)
            after = answer.headers.get("Retry-After")
            raise KubeError(answer.status, message.strip(), str(content.get("reason", "")), after)
        return content


def _configuration() -> client.Configuration:
    configuration = client.Configuration()
    load: Any = config  # the library's loaders carry no types
    try:
        load.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        load.load_kube_config(client_configuration=configuration, persist_config=False)
    return configuration


def connections(configuration: client.Configuration, size: int) -> urllib3.PoolManager:
    """Return a connection pool for the API server from the library's configuration."""
    options: dict[str, Any] = {
        "num_pools": 4,
        "maxsize": size,
        "cert_reqs": "CERT_REQUIRED" if configuration.verify_ssl else "CERT_NONE",
        "ca_certs": configuration.ssl_ca_cert,
        "cert_file": configuration.cert_file,
        "key_file": configuration.key_file,
    }
    if configuration.tls_server_name:
        options["server_hostname"] = configuration.tls_server_name
    if configuration.proxy and not should_bypass_proxies(configuration.host, no_proxy=configuration.no_proxy or ""):
        return urllib3.ProxyManager(configuration.proxy, proxy_headers=configuration.proxy_headers, **options)
    return urllib3.PoolManager(**options)


def _namespace(where: str) -> str:
    _, _, rest = where.partition("/namespaces/")
    return rest.partition("/")[0]


def _seconds(retry_after: str | None) -> float:
    """Parse a Retry-After header (RFC 9110, 10.2.3), which the API server sets in whole seconds."""
    return min(float(retry_after), _LONGEST_RETRY_AFTER) if retry_after and retry_after.isdecimal() else 1.0


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
