"""A small client of the Kubernetes API on the standard library: get, post, delete and watch."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lab.machine.errors import say

Object = dict[str, Any]


class ApiError(Exception):
    """An unsuccessful response of the API server."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Api:
    """The cluster that a kubeconfig of the lab names."""

    def __init__(self, kubeconfig: Path) -> None:
        document = json.loads(kubeconfig.read_text())
        cluster, user = document["clusters"][0]["cluster"], document["users"][0]["user"]
        self._address = urlsplit(cluster["server"])
        self._tls = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
        with tempfile.NamedTemporaryFile() as pair:
            # ssl reads certificates from files only.
            pair.write(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
            pair.flush()
            self._tls.load_cert_chain(pair.name)

    def get(self, path: str) -> Any:
        return self._request("GET", path)

    def post(self, path: str, body: Object) -> Any:
        return self._request("POST", path, body)

    def delete(self, path: str) -> Any:
        return self._request("DELETE", path)

    def ready(self) -> bool:
        """Return True if the API server reports that it is ready."""
        try:
            self._request("GET", "/readyz")
        except (OSError, http.client.HTTPException, ApiError):
            return False
        return True

    def watch(self, path: str, version: str) -> Iterator[tuple[str, Object]]:
        """Yield events since a resource version, until the server ends the stream."""
        connection = self._connect(timeout=330)
        try:
            connection.request("GET", f"{path}?watch=1&timeoutSeconds=300&resourceVersion={version}")
            response = connection.getresponse()
            if response.status != 200:
                raise ApiError(response.status, response.read(500).decode(errors="replace"))
            for line in response:
                event = json.loads(line)
                yield event["type"], event["object"]
        finally:
            connection.close()

    def _connect(self, timeout: float) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(
            self._address.hostname or "", self._address.port, timeout=timeout, context=self._tls
        )

    def _request(self, method: str, path: str, body: Object | None = None) -> Any:
        connection = self._connect(timeout=60)
        try:
            payload = json.dumps(body) if body is not None else None
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if response.status >= 400:
            raise ApiError(response.status, content.decode(errors="replace")[:500])
        return json.loads(content) if content.startswith(b"{") else content.decode()


def follow(api: Api, path: str, changed: Callable[[dict[tuple[str, str], Object]], None]) -> None:
    """Keep a mirror of all objects at a path, by namespace and name; call back at each change. Never returns."""
    while True:
        try:
            listed = api.get(path)
            mirror = {_key(item): item for item in listed["items"]}
            changed(mirror)
            for kind, item in api.watch(path, listed["metadata"]["resourceVersion"]):
                if kind == "ERROR":
                    break  # the version is too old: list again
                if kind == "DELETED":
                    mirror.pop(_key(item), None)
                elif kind in ("ADDED", "MODIFIED"):
                    mirror[_key(item)] = item
                changed(mirror)
        except (OSError, http.client.HTTPException, ValueError, ApiError) as error:
            say(f"watching {path}: {error}; retrying in a second")
            time.sleep(1)


def _key(item: Object) -> tuple[str, str]:
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]
