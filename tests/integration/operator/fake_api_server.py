"""A fake API server with a kubelet that runs everything at once, and with faults on demand."""

import asyncio
import copy
import datetime as dt
import json
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from tests.support.ports import free_port

Body = dict[str, Any]
Place = tuple[str, str, str]  # plural, namespace, name

_KINDS = {
    "namespaces": ("v1", "Namespace"), "nodes": ("v1", "Node"), "pods": ("v1", "Pod"), "services": ("v1", "Service"),
    "secrets": ("v1", "Secret"), "configmaps": ("v1", "ConfigMap"), "events": ("v1", "Event"),
    "persistentvolumeclaims": ("v1", "PersistentVolumeClaim"),
    "networkpolicies": ("networking.k8s.io/v1", "NetworkPolicy"),
    "poddisruptionbudgets": ("policy/v1", "PodDisruptionBudget"),
    "federatedjobs": ("isthmus.dev/v1alpha1", "FederatedJob"), "hpcsites": ("isthmus.dev/v1alpha1", "HPCSite"),
}  # fmt: skip
_CLUSTER_WIDE = ("namespaces", "nodes", "hpcsites")


class ApiServer:
    """An API server with objects in memory and watches, served from its own thread."""

    def __init__(self) -> None:
        self.port = free_port()
        self.objects: dict[Place, Body] = {}
        self.forbidden: set[str] = set()  # namespaces in which the operator has no rights
        self.idle: set[str] = set()  # namespaces whose pods never start
        self.slow: dict[str, float] = {}  # delay of pod creations by namespace
        self.writes: list[str] = []  # requests, as METHOD plural/name
        self.watch_seconds = 300.0
        self.pod_started: Callable[[Body], Any] | None = None
        """A function that is called in the server's loop with each pod that starts, and returns its address."""
        self.servers: list[Any] = []
        """gRPC servers that are stopped with this one."""
        self._version = 1
        self._log: list[tuple[int, str, str, Body]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._background: set[asyncio.Task[Any]] = set()
        self._news = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self.run(self._serve()).result(30)
        self.put("namespaces", {"metadata": {"name": "kube-system"}})
        return self

    def __exit__(self, *_: object) -> None:
        assert self._runner is not None
        for task in self._background:
            self._loop.call_soon_threadsafe(task.cancel)
        for server in self.servers:
            self.run(server.stop(0)).result(30)
        self.run(self._runner.cleanup()).result(30)
        self.run(self._end()).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def run(self, coroutine: Any) -> "Future[Any]":
        """Run a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def kubeconfig(self, path: Path) -> Path:
        """Return the credentials for this server."""
        content = {
            "apiVersion": "v1", "kind": "Config", "current-context": "x",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        }  # fmt: skip
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    # -- as an admin, without faults

    def put(self, plural: str, body: Body, namespace: str = "") -> Body:
        """Create an object."""
        body = copy.deepcopy(body)
        return dict(self.run(self._create(plural, namespace, body["metadata"]["name"], body)).result(30))

    def change(self, plural: str, namespace: str, name: str, patch: Body) -> Body:
        """Change an object by a merge patch, including its status."""
        return dict(self.run(self._changed((plural, namespace, name), patch)).result(30))

    def get(self, plural: str, namespace: str, name: str) -> Body:
        """Return an object; empty if it does not exist."""
        return copy.deepcopy(self.objects.get((plural, namespace, name)) or {})

    def items(self, plural: str, namespace: str = "") -> list[Body]:
        """Return the objects of a kind."""
        found = list(self.objects.items())
        return [copy.deepcopy(body) for (kind, where, _), body in found if kind == plural and namespace in ("", where)]

    def delete(self, plural: str, namespace: str, name: str) -> None:
        """Delete an object once its finalizers are gone."""
        self.run(self._delete((plural, namespace, name))).result(30)

    def condition(self, namespace: str, name: str, type_: str) -> str:
        """Return ``Status/Reason`` of a job's condition; empty if it is not set."""
        found = (self.get("federatedjobs", namespace, name).get("status") or {}).get("conditions") or ()
        return next((f"{item['status']}/{item['reason']}" for item in found if item["type"] == type_), "")

    def events(self, reason: str) -> list[str]:
        """Return the messages of events."""
        return [item["message"] for item in self.items("events") if item["reason"] == reason]

    # -- the objects

    async def _publish(self, type_: str, plural: str, body: Body) -> None:
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        self._log.append((self._version, type_, plural, copy.deepcopy(body)))
        async with self._news:
            self._news.notify_all()

    async def _create(self, plural: str, namespace: str, name: str, body: Body) -> Body:
        version, kind = _KINDS[plural]
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        given = {"name": name, "uid": str(uuid.uuid4()), "creationTimestamp": now, "generation": 1}
        body |= {"apiVersion": version, "kind": kind, "metadata": {**body["metadata"], **given}}
        if namespace:
            body["metadata"]["namespace"] = namespace
        if plural == "services":
            body["spec"]["clusterIP"] = "10.96.0.9"
        self.objects[plural, namespace, name] = body
        await self._publish("ADDED", plural, body)
        if plural == "pods":
            self._later(self._start_pod((plural, namespace, name), body["metadata"]["uid"]))
        return body

    def _later(self, coroutine: Any) -> None:
        task = self._loop.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _start_pod(self, place: Place, uid: str) -> None:
        body = self.objects.get(place)
        if body is None or body["metadata"]["uid"] != uid or place[1] in self.idle:
            return
        address = "127.0.0.1"
        if self.pod_started is not None:
            address = await self.pod_started(body)
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        states = [
            {"name": item["name"], "ready": True, "restartCount": 0, "state": {"running": {"startedAt": now}}}
            for item in body["spec"]["containers"]
        ]
        ready = [{"type": name, "status": "True"} for name in ("Ready", "PodScheduled")]
        body["status"] = {"phase": "Running", "podIP": address, "hostIP": "127.0.0.1", "startTime": now,
                          "conditions": ready, "containerStatuses": states}  # fmt: skip
        await self._publish("MODIFIED", "pods", body)

    async def _changed(self, place: Place, patch: Body, subresource: str = "") -> Body:
        before = self.objects[place]
        after: Body = _merged(before, patch)
        if after.get("spec") != before.get("spec"):
            after["metadata"]["generation"] = before["metadata"].get("generation", 1) + 1
        if subresource == "status":
            after = {**before, "metadata": dict(before["metadata"]), "status": after.get("status") or {}}
        after["metadata"]["uid"] = before["metadata"]["uid"]
        if after == before:
            return before
        self.objects[place] = after
        await self._publish("MODIFIED", place[0], after)
        if after["metadata"].get("deletionTimestamp") and not after["metadata"].get("finalizers"):
            await self._remove(place)
        return after

    async def _delete(self, place: Place) -> None:
        body = self.objects.get(place)
        if body is None:
            return
        if body["metadata"].get("finalizers"):
            if not body["metadata"].get("deletionTimestamp"):
                body["metadata"]["deletionTimestamp"] = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                await self._publish("MODIFIED", place[0], body)
            return
        await self._remove(place)

    async def _remove(self, place: Place) -> None:
        body = self.objects.pop(place, None)
        if body is None:
            return
        await self._publish("DELETED", place[0], body)
        for other, owned in list(self.objects.items()):
            owners = owned["metadata"].get("ownerReferences") or ()
            if any(owner.get("uid") == body["metadata"]["uid"] for owner in owners):
                await self._delete(other)

    # -- over HTTP

    async def _serve(self) -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{tail:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        parts = [part for part in request.path.split("/") if part]
        if not _KINDS.keys() & set(parts):
            return _discovery(parts)
        rest = parts[2:] if parts[0] == "api" else parts[3:]
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        plural, name, subresource = (*rest, "", "")[:3]
        if namespace in self.forbidden:
            message = f'{plural} is forbidden: User "operator" cannot {request.method} in the namespace "{namespace}"'
            return _failed(403, "Forbidden", message)
        place = plural, namespace, name
        if request.method != "GET":
            return await self._write(request, place, subresource)
        if not name:
            return await self._list(request, plural, namespace)
        body = self.objects.get(place)
        return web.json_response(body) if body else _failed(404, "NotFound", f'{plural} "{name}" not found')

    async def _list(self, request: web.Request, plural: str, namespace: str) -> web.StreamResponse:
        labels = dict(part.split("=", 1) for part in request.query.get("labelSelector", "").split(",") if part)

        def wanted(body: Body) -> bool:
            found = body["metadata"].get("labels") or {}
            inside = namespace in ("", body["metadata"].get("namespace", ""))
            return inside and all(found.get(key) == value for key, value in labels.items())

        if request.query.get("watch") == "true":
            return await self._watch(request, plural, namespace, wanted)
        items = [body for (kind, _, _), body in sorted(self.objects.items()) if kind == plural and wanted(body)]
        version, kind = _KINDS[plural]
        listed = {"kind": f"{kind}List", "apiVersion": version, "metadata": {"resourceVersion": str(self._version)}}
        return web.json_response({**listed, "items": items})

    async def _watch(
        self, request: web.Request, plural: str, namespace: str, wanted: Callable[[Body], bool]
    ) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_type = "application/json"
        await response.prepare(request)
        since = int(request.query.get("resourceVersion") or self._version)
        end, place = self._loop.time() + self.watch_seconds, 0
        while self._loop.time() < end and namespace not in self.forbidden:
            while place < len(self._log):
                version, type_, kind, body = self._log[place]
                place += 1
                if version > since and kind == plural and wanted(body):
                    try:
                        await response.write(json.dumps({"type": type_, "object": body}).encode() + b"\n")
                    except ConnectionError:
                        return response
            with suppress(TimeoutError):
                async with asyncio.timeout(1), self._news:
                    if place == len(self._log):
                        await self._news.wait()
        return response

    async def _write(self, request: web.Request, place: Place, subresource: str) -> web.Response:
        plural, namespace, name = place
        body = await request.json() if request.can_read_body else {}
        metadata = body.get("metadata") or {}
        if request.method == "POST":
            if plural == "pods" and namespace in self.slow:
                await asyncio.sleep(self.slow[namespace])
            name = metadata.get("name") or metadata["generateName"] + uuid.uuid4().hex[:5]
            if (plural, namespace, name) in self.objects:
                return _failed(409, "AlreadyExists", f'{plural} "{name}" already exists')
            self.writes.append(f"POST {plural}/{name}")
            return web.json_response(await self._create(plural, namespace, name, body), status=201)
        self.writes.append(f"{request.method} {plural}/{name}")
        known = self.objects.get(place)
        if request.method == "PATCH" and known is None and "apply-patch" in request.headers["Content-Type"]:
            return web.json_response(await self._create(plural, namespace, name, body), status=201)
        if known is None:
            return _failed(404, "NotFound", f'{plural} "{name}" not found')
        if request.method == "DELETE":
            metadata = body.get("preconditions") or {}
        for field in ("uid", "resourceVersion"):
            if metadata.get(field) and metadata[field] != known["metadata"][field]:
                return _failed(409, "Conflict", f"the {field} is {known['metadata'][field]}, not {metadata[field]}")
        if request.method == "DELETE":
            await self._delete(place)
            return web.json_response(known)
        return web.json_response(await self._changed(place, body, subresource))


def _merged(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


def _failed(code: int, reason: str, message: str) -> web.Response:
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
              "reason": reason, "code": code}  # fmt: skip
    return web.json_response(status, status=code)


def _discovery(parts: list[str]) -> web.Response:
    groups = sorted({version for version, _ in _KINDS.values()} - {"v1"})
    if parts == ["version"]:
        return web.json_response({"major": "1", "minor": "30", "gitVersion": "v1.30.0"})
    if parts == ["api"]:
        return web.json_response({"kind": "APIVersions", "versions": ["v1"]})
    if parts == ["apis"]:
        listed = [{"groupVersion": group, "version": group.split("/")[1]} for group in groups]
        items = [{"name": group.split("/")[0], "versions": [version], "preferredVersion": version}
                 for group, version in zip(groups, listed, strict=True)]  # fmt: skip
        return web.json_response({"kind": "APIGroupList", "apiVersion": "v1", "groups": items})
    version = "v1" if parts[0] == "api" else "/".join(parts[1:3])
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {"name": plural, "singularName": kind.lower(), "namespaced": plural not in _CLUSTER_WIDE, "kind": kind,
         "verbs": verbs}
        for plural, (group, kind) in _KINDS.items() if group == version
    ]  # fmt: skip
    if not resources:
        return _failed(404, "NotFound", "the server could not find the requested resource")
    listing = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}
    return web.json_response(listing)
