"""Requests to the API server that the command line makes, with the user's own rights."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

import urllib3
from kubernetes import client, config
from kubernetes.client.rest import should_bypass_proxies
from kubernetes.stream import stream
from urllib3 import Timeout
from urllib3.exceptions import HTTPError

from isthmus_contracts import identities as ids


class ClusterError(Exception):
    """A request to the cluster failed. ``str()`` is one line; ``code`` is the HTTP status, or 0."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Cluster:
    """One namespace of the cluster that the kubeconfig names."""

    def __init__(self, context: str | None, namespace: str | None) -> None:
        load: Any = config  # the library's loaders are untyped
        self._configuration: Any = client.Configuration()
        try:
            load.load_kube_config(context=context, client_configuration=self._configuration)
            contexts, active = load.list_kube_config_contexts()
            chosen = next((item for item in contexts if item["name"] == context), active)
            found = (chosen.get("context") or {}).get("namespace")
        except config.ConfigException as error:
            raise ClusterError(f"no cluster: {' '.join(str(error).split())}; see kubectl config") from None
        self.namespace: str = namespace or found or "default"
        self._pool = _connections(self._configuration)

    def job(self, name: str) -> dict[str, Any]:
        """Return a FederatedJob."""
        return self.request("GET", f"{self._jobs()}/{name}")

    def jobs(self) -> list[dict[str, Any]]:
        """Return the namespace's FederatedJobs."""
        return list(self.request("GET", self._jobs())["items"])

    def sites(self) -> list[dict[str, Any]]:
        """Return all HPCSites."""
        return list(self.request("GET", f"/apis/{ids.API_VERSION}/hpcsites")["items"])

    def pods(self, job: str) -> list[dict[str, Any]]:
        """Return a job's pods."""
        query = {"labelSelector": f"{ids.LABEL_JOB}={job}"}
        return list(self.request("GET", f"{self._core()}/pods", query=query)["items"])

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        """Return an object of core/v1, or None. ``kind``: in the plural, in lower case."""
        try:
            return self.request("GET", f"{self._core()}/{kind}/{name}")
        except ClusterError as error:
            if error.code == 404:
                return None
            raise

    def create(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Create a FederatedJob or an object of core/v1; return it as stored."""
        kind = str(body["kind"])
        where = self._jobs() if kind == "FederatedJob" else f"{self._core()}/{kind.lower()}s"
        return self.request("POST", where, body)

    def annotate(self, job: str, annotations: Mapping[str, str]) -> None:
        """Set annotations of a FederatedJob."""
        body = {"metadata": {"annotations": dict(annotations)}}
        self.request("PATCH", f"{self._jobs()}/{job}", body, content="application/merge-patch+json")

    def delete(self, kind: str, name: str) -> None:
        """Delete an object of core/v1. ``kind``: in the plural, in lower case."""
        self.request("DELETE", f"{self._core()}/{kind}/{name}", {"gracePeriodSeconds": 0})

    def follow(self, pod: str, container: str, *, lines: int | None, follow: bool) -> Iterator[bytes]:
        """Yield a container's log as it arrives."""
        query: dict[str, Any] = {"container": container, "follow": str(follow).lower()}
        if lines is not None:
            query["tailLines"] = lines
        response = self._call("GET", f"{self._core()}/pods/{pod}/log", query=query, raw=True)
        yield from response.stream(8192)

    def read_file(self, pod: str, container: str, path: str) -> bytes:
        """Return the content of a file in a running container."""
        api: Any = client.CoreV1Api(client.ApiClient(self._configuration))
        try:
            response = stream(
                api.connect_get_namespaced_pod_exec, pod, self.namespace, container=container,
                command=["cat", path], stdout=True, stderr=True, stdin=False, tty=False,
                binary=True, _preload_content=False,
            )  # fmt: skip
            response.run_forever()
        except client.ApiException as error:
            raise ClusterError(f"cannot run a command in pod {pod}: {' '.join(str(error.reason).split())}") from None
        if response.returncode:
            words = " ".join(bytes(response.read_stderr() or b"").decode(errors="replace").split())
            raise ClusterError(f"cannot read {path} in pod {pod}: {words}")
        return bytes(response.read_stdout() or b"")

    def request(
        self,
        method: str,
        where: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
        content: str = "application/json",
    ) -> dict[str, Any]:
        """Send a request and return its JSON response. Raises :class:`ClusterError`."""
        response = self._call(method, where, body, query, content)
        return dict(json.loads(response.data))

    def _call(
        self,
        method: str,
        where: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
        content: str = "application/json",
        raw: bool = False,
    ) -> Any:
        headers = {"Accept": "*/*" if raw else "application/json", "Content-Type": content, "User-Agent": "isthmus"}
        # This also refreshes a rotating token.
        token = self._configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        if token:
            headers["Authorization"] = token
        url = self._configuration.host.rstrip("/") + where + (f"?{urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        try:
            response = self._pool.request(
                method, url, body=data, headers=headers, timeout=Timeout(connect=10, read=None if raw else 30),
                retries=False, preload_content=not raw,
            )  # fmt: skip
        except (HTTPError, OSError) as error:
            raise ClusterError(f"the cluster does not respond: {' '.join(str(error).split())[:300]}") from None
        if response.status >= 400:
            raise _refusal(response.status, response.data)
        return response

    def _core(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}"

    def _jobs(self) -> str:
        return f"/apis/{ids.API_VERSION}/namespaces/{self.namespace}/federatedjobs"


def _connections(configuration: Any) -> urllib3.PoolManager:
    options: dict[str, Any] = {
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


def _refusal(status: int, body: bytes) -> ClusterError:
    try:
        message = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        message = body.decode("utf-8", "replace")[:300] or f"status {status}"
    return ClusterError(re.sub(r"\s+", " ", message), status)
