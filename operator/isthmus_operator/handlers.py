"""The kopf handlers, which watch FederatedJobs, HPCSites and pods.

An event only adds a key to a queue; the actions follow from the state, not from the event. So kopf stores nothing on
the objects and needs no finalizer of its own.
"""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import kopf

from isthmus_contracts import identities as ids

from .app import App
from .controllers.resync import RETRY
from .state.pod_store import job_of, job_uid_of

# The type of an event from kopf's list before it watches. If the object was known, the watch was restarted because its
# resource version was too old (410), and deletions in between are not reported.
_LISTED = None


class _Backoffs:
    """Endless delays in seconds between retries of failed requests.

    When a watch gives up, the operator ends for all namespaces. One namespace that revokes its rights must not cause
    that.
    """

    def __iter__(self) -> Iterator[float]:
        return itertools.chain((1.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0), itertools.repeat(RETRY))


def build_registry(app: App) -> kopf.OperatorRegistry:
    """Return the handlers of one operator."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def login(**kwargs: Any) -> Any:
        return kopf.login_via_client(**kwargs)

    @kopf.on.startup(registry=registry)
    async def startup(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)
        await app.start()

    @kopf.on.cleanup(registry=registry)
    async def cleanup(**_: Any) -> None:
        await app.stop()

    @kopf.on.event(ids.GROUP, ids.VERSION, "federatedjobs", registry=registry)
    async def job_event(event: Any, **_: Any) -> None:
        body = event["object"]
        key = (body["metadata"]["namespace"], body["metadata"]["name"])
        if event["type"] == "DELETED":
            app.job_gone(key, body["metadata"]["uid"])
            return
        again = event["type"] is _LISTED and app.jobs.get(key) is not None
        app.job_seen(body)
        if again:
            app.resync.mark_stale()
            app.pods.mark_stale(body["metadata"]["uid"])
            app.queue.add(key)

    @kopf.on.event("", "v1", "pods", labels={ids.LABEL_MANAGED_BY: ids.MANAGED_BY}, registry=registry)
    async def pod_event(event: Any, **_: Any) -> None:
        body = event["object"]
        if event["type"] == "DELETED":
            app.pods.drop(body)
        else:
            if event["type"] is _LISTED and app.pods.knows(body):
                app.resync.mark_stale()
                app.pods.mark_stale(job_uid_of(body))
            app.pods.put(body)
        app.queue.add(job_of(body))

    async def site_event(event: Any, **_: Any) -> None:
        body = event["object"]
        name = body["metadata"]["name"]
        if event["type"] == "DELETED":
            app.site_gone(name)
            return
        if event["type"] is _LISTED and name in app.sites.bodies:
            app.resync.mark_stale()
        app.site_seen(body)

    if app.settings.sites:
        kopf.on.event(ids.GROUP, ids.VERSION, "hpcsites", registry=registry)(site_event)

    _silence()
    return registry


def configure(settings: kopf.OperatorSettings) -> None:
    """Configure kopf."""
    # Watch the operator's own pods only.
    settings.watching.label_selectors["pods"] = f"{ids.LABEL_MANAGED_BY}={ids.MANAGED_BY}"
    # A watch without news for a while may be dead.
    settings.watching.server_timeout = 300
    settings.watching.connect_timeout = 15
    settings.networking.request_timeout = 60
    settings.networking.error_backoffs = _Backoffs()
    # kopf has a worker for each object with news, which ends when idle. With fewer workers than objects, the events of
    # the others would wait for that and fill the memory.
    settings.queueing.worker_limit = None
    settings.queueing.idle_timeout = 0.5
    # The resources and namespaces are known, so no rights to watch CRDs or namespaces are needed.
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.peering.standalone = True


def _silence() -> None:
    # kopf logs each handled event, which is of no use here.
    for name in ("kopf.objects", "kopf.activities"):
        logging.getLogger(name).setLevel(logging.WARNING)
