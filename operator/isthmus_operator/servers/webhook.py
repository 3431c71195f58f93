"""The admission webhook: an HTTPS server on the operator's event loop that uses cached data."""

import asyncio
import base64
import json
import logging
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.identities import CERTIFICATE_FILE, KEY_FILE
from isthmus_contracts.wire.addresses import bound, joined

from ..metrics import ADMISSION
from ..render.defaults import NONE, JobDefaults
from ..state.job_store import SiteStore
from .admission import Answer, defaults, review_job, review_site

log = logging.getLogger(__name__)

_MAX_BODY = 8 << 20  # new and old object, each below etcd's limit
# The kubelet updates a mounted Secret within about a minute; certificates are renewed weeks before they expire.
_RELOAD_SECONDS = 30.0

# From namespace, name and uid to the spec in force, if the job was accepted and has been reconciled.
Accepted = Callable[[str, str, str], FederatedJobSpec | None]


class Webhook:
    """The server of ``/default`` and ``/validate``."""

    def __init__(
        self,
        accepted: Accepted,
        sites: SiteStore,
        allowed: frozenset[str],
        namespaces: tuple[str, ...] = (),
        excluded: frozenset[str] = frozenset(),
        given: JobDefaults = NONE,
    ) -> None:
        self._accepted = accepted
        self._sites = sites
        self._allowed = allowed
        self._namespaces = namespaces
        self._excluded = excluded
        self._given = given
        self._runner: web.AppRunner | None = None

    async def serve(self, host: str, port: int, tls: Path) -> None:
        """Serve until cancelled, with the TLS files of a directory, which are reloaded. Raises ``OSError``."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        loaded = _load(context, tls)
        app = web.Application(client_max_size=_MAX_BODY)
        app.add_routes([web.post("/default", self._default), web.post("/validate", self._validate)])
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.SockSite(self._runner, bound(host, port), ssl_context=context).start()
            log.info("admission webhook at %s", joined(host, port))
            while True:
                await asyncio.sleep(_RELOAD_SECONDS)
                try:
                    if _stamp(tls) != loaded:
                        # New connections use the new certificate.
                        loaded = _load(context, tls)
                        log.info("the webhook's certificate was renewed")
                except OSError as error:
                    log.error("the webhook's certificate cannot be read: %s", error)
        finally:
            await self._runner.cleanup()

    async def _default(self, request: web.Request) -> web.Response:
        review = await _review(request)
        patch = defaults(review["object"]) if self._ours(review) and review.get("operation") == "CREATE" else []
        return _answer(review, Answer(True), patch)

    async def _validate(self, request: web.Request) -> web.Response:
        review = await _review(request)
        answer = self._judge(review) if self._ours(review) else Answer(True)
        ADMISSION.labels("allowed" if answer.allowed else "denied").inc()
        return _answer(review, answer)

    def _judge(self, review: Mapping[str, Any]) -> Answer:
        new, old = review["object"], review.get("oldObject")
        if (review.get("kind") or {}).get("kind") == "HPCSite":
            return review_site(new, old)
        metadata = new.get("metadata") or {}
        # With generateName, the name is generated after admission.
        name = str(metadata.get("name") or review.get("name") or metadata.get("generateName", "") + "xxxxx")
        namespace = str(review.get("namespace") or metadata.get("namespace") or "")
        new = {**new, "metadata": {**metadata, "name": name, "namespace": namespace}}
        accepted = self._accepted(namespace, name, str(metadata.get("uid") or "")) if old is not None else None
        return review_job(new, old, accepted, self._sites.specs, self._allowed, self._given)

    def _ours(self, review: Mapping[str, Any]) -> bool:
        """Return True if this operator serves the object's namespace; another one may have other allowances."""
        namespace = review.get("namespace")
        if review.get("object") is None or namespace in self._excluded:
            return False
        return not self._namespaces or not namespace or namespace in self._namespaces


async def _review(request: web.Request) -> dict[str, Any]:
    try:
        review = json.loads(await request.read())["request"]
        if not isinstance(review, dict) or not isinstance(review.get("uid"), str):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise web.HTTPBadRequest(text="not an AdmissionReview") from None
    return review


def _answer(review: Mapping[str, Any], answer: Answer, patch: list[dict[str, Any]] | None = None) -> web.Response:
    response: dict[str, Any] = {"uid": review["uid"], "allowed": answer.allowed}
    if answer.message:
        response["status"] = {"code": 422, "reason": "Invalid", "message": answer.message}
    if answer.warnings:
        response["warnings"] = list(answer.warnings)
    if patch:
        response |= {"patchType": "JSONPatch", "patch": base64.b64encode(json.dumps(patch).encode()).decode()}
    return web.json_response({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response})


def _load(context: ssl.SSLContext, tls: Path) -> tuple[bytes, bytes]:
    try:
        context.load_cert_chain(tls / CERTIFICATE_FILE, tls / KEY_FILE)
    except ssl.SSLError as error:
        raise OSError(f"{tls} holds no certificate with its key: {error}") from None
    return _stamp(tls)


def _stamp(tls: Path) -> tuple[bytes, bytes]:
    return (tls / CERTIFICATE_FILE).read_bytes(), (tls / KEY_FILE).read_bytes()
