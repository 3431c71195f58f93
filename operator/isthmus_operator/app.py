"""The operator's parts, put together."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import prometheus_client

from isthmus_contracts import identities as ids
from isthmus_contracts.process import asyncio_tasks
from isthmus_contracts.wire.addresses import split
from isthmus_contracts.wire.http_server import serve_metrics

from .controllers.job import JobReconciler
from .controllers.ownership import identity
from .controllers.resync import RETRY, Resync
from .controllers.site import SiteReconciler
from .controllers.task_logs import TaskLogs
from .controllers.workqueue import WorkQueue
from .effects.aggregators import Aggregators
from .effects.apply import Effects
from .effects.bridge import Bridges
from .effects.bridge_channels import BridgeChannels
from .effects.kube import Kube, KubeError
from .effects.observe import Observer
from .effects.site_holds import SiteHolds
from .metrics import QUEUE_AGE, QUEUE_DEPTH, REGISTRY, RESYNC_AGE, WORKERS_BUSY, JobsCollector
from .planning.context import PlanOptions
from .servers.gateway import Gateway
from .servers.health import Health, serve
from .servers.webhook import Webhook
from .settings import Settings
from .state.clock import Clock
from .state.job_store import JobStore, Key, SiteStore
from .state.observed import Job
from .state.pod_store import PodStore

log = logging.getLogger(__name__)

_SITE_WORKERS = 8
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class App:
    """Everything that lives as long as the operator."""

    queue: WorkQueue[Key]
    site_queue: WorkQueue[str]

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.jobs = JobStore()
        self.clock = Clock()
        self.pods = PodStore(self.clock.now)
        self.sites = SiteStore()
        self.resync = Resync(
            self.jobs,
            self.sites if settings.sites else None,
            settings.namespaces,
            job_seen=self.job_seen,
            job_gone=self.job_gone,
            site_seen=self.site_seen,
            site_gone=self.site_gone,
        )
        RESYNC_AGE.set_function(self.resync.age)
        self.health = Health(self.resync)
        self.gateway = Gateway(self._tunnel_changed) if settings.gateway else None
        self._kept: dict[str, Callable[[], int]] = {"jobs": self.jobs.count, "pods": self.pods.count}
        self._tasks: list[asyncio.Task[None]] = []
        self._stops: list[Any] = []

    async def start(self) -> None:
        """Connects, and starts the queues and the servers. Returns once there is something to watch."""
        settings = self.settings
        kube = Kube.connect(settings.api_concurrency, settings.request_timeout, self.clock)
        self._serve()
        await _wait_for_resources(kube)
        await kube.discover()
        cluster = settings.cluster or (await _cluster_uid(kube) if settings.sites else "none")
        channels = BridgeChannels(kube, self.sites, self.gateway.addresses if self.gateway is not None else None)
        bridges, aggregators = Bridges(channels, self.clock), Aggregators()
        options = PlanOptions(
            cluster=cluster,
            resync=settings.resync,
            site_give_up=settings.site_give_up,
            network_policies=settings.network_policies,
            identity=identity(settings.cluster, _own_namespace(), settings.namespaces),
            namespace=_own_namespace(),
            allowed=settings.allow_in_templates,
            defaults=settings.job_defaults,
        )
        observer = Observer(kube, self.pods, self.sites, bridges, aggregators, options)
        holds = SiteHolds(kube, self.jobs, self.sites)
        effects = Effects(kube, self.jobs, self.pods, bridges, holds)
        logs = TaskLogs(kube, bridges, cluster)
        jobs = JobReconciler(self.jobs, self.pods, observer, effects, aggregators, holds, logs, options, self.clock)
        sites = SiteReconciler(kube, self.sites, bridges, holds, self.site_changed, settings.resync)
        self.queue = WorkQueue(self._reconcile_served(jobs), workers=settings.workers, group=lambda key: key[0])
        QUEUE_DEPTH.set_function(self.queue.waiting)
        QUEUE_AGE.set_function(self.queue.waited)
        WORKERS_BUSY.set_function(self.queue.busy)
        self.site_queue = WorkQueue(sites.reconcile, workers=_SITE_WORKERS)
        loop = asyncio.get_running_loop()
        self._kept |= {
            "memories": jobs.count,
            "channels": aggregators.count,
            "keys": self.queue.count,
            "tasks": lambda: len(asyncio.all_tasks(loop)),
        }
        self.health.watch(self.queue)
        self.health.watch(self.site_queue)
        coroutines = [self.queue.run(), self.site_queue.run(), self.health.run(), self.resync.run(kube)]
        if settings.webhook:
            webhook = Webhook(
                jobs.accepted,
                self.sites,
                settings.allow_in_templates,
                settings.namespaces,
                settings.excluded,
                settings.job_defaults,
            )
            coroutines.append(webhook.serve(*split(settings.webhook), Path(settings.webhook_tls)))
        if self.gateway is not None:
            coroutines.append(self.gateway.serve(settings.gateway, Path(settings.gateway_tls), channels.prove))
        for coroutine in coroutines:
            task = asyncio.create_task(coroutine)
            task.add_done_callback(self._ended)
            self._tasks.append(task)
        self._stops = [kube, bridges, aggregators]
        where = ", ".join(settings.namespaces) or "all namespaces"
        log.info("serving %s as cluster %s", where, cluster)

    async def stop(self) -> None:
        """Stops at once: whatever was under way is taken up again by the next operator."""
        await asyncio_tasks.end(self._tasks)
        for part in self._stops:
            closed = part.close()
            if closed is not None:
                await closed

    def _reconcile_served(self, jobs: JobReconciler) -> Callable[[Key], Awaitable[float | None]]:
        """Looks at a job, unless all of its namespace is refused."""

        async def reconcile(key: Key) -> float | None:
            job = self.jobs.get(key)
            if key[0] in self.resync.refused and job is not None and job.deleted is None:
                return RETRY
            try:
                return await jobs.reconcile(key)
            except KubeError as error:
                if error.code == 403:
                    self.resync.refusal(key[0])
                raise

        return reconcile

    def job_seen(self, body: Mapping[str, Any]) -> None:
        """Takes in a FederatedJob, and looks at it where that is news."""
        if body["metadata"]["namespace"] in self.settings.excluded:
            return
        if self.jobs.put(body):
            self.queue.add((body["metadata"]["namespace"], body["metadata"]["name"]))

    def job_gone(self, key: Key, uid: str) -> None:
        """Takes in a FederatedJob's end."""
        self.jobs.drop(key, uid)
        self.queue.add(key)

    def site_seen(self, body: Mapping[str, Any]) -> None:
        """Takes in an HPCSite, and asks it about itself where its spec is news."""
        if self.sites.put(body):
            name = body["metadata"]["name"]
            self.site_changed(name)
            self.site_queue.add(name)

    def site_gone(self, name: str) -> None:
        """Takes in an HPCSite's end."""
        self.sites.drop(name)
        self.site_changed(name)
        self.site_queue.add(name)

    def site_changed(self, name: str) -> None:
        """Wakes the jobs that use a site, and ends the tunnel of one that does not dial out any more."""
        spec = self.sites.specs.get(name)
        if self.gateway is not None:
            if spec is not None and spec.connection == "DialOut":
                self.gateway.expect(name)
            else:
                self.gateway.drop(name)
        for job in self.jobs.all():
            if _uses(job, name):
                self.queue.add((job.namespace, job.name))

    def _tunnel_changed(self, name: str) -> None:
        self.site_queue.add(name)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Nothing here ends by itself: if it does, the liveness probe has the operator restarted."""
        if not task.cancelled():
            log.critical("a part of the operator ended", exc_info=task.exception())
            self.health.broken = True

    def _serve(self) -> None:
        host, port = split(self.settings.metrics)
        kept = self._kept
        REGISTRY.register(
            JobsCollector(
                self._statuses,
                lambda: dict(self.sites.reachable),
                lambda: {kind: count() for kind, count in kept.items()},
            )
        )
        serve_metrics(prometheus_client.make_wsgi_app(REGISTRY), host, port)
        serve(self.health, *split(self.settings.health))

    def _statuses(self) -> list[tuple[str, str, Mapping[str, Any]]]:
        return [(job.namespace, job.name, job.status) for job in self.jobs.all()]


async def _wait_for_resources(kube: Kube) -> None:
    """Until the CRDs are there: kopf would not notice them later."""
    told = False
    while True:
        try:
            await kube.probe(f"/apis/{ids.API_VERSION}")
            return
        except KubeError as error:
            if not told:
                log.warning("waiting for the API %s: %s", ids.API_VERSION, error)
                told = True
            await asyncio.sleep(2)


async def _cluster_uid(kube: Kube) -> str:
    while True:
        try:
            body = await kube.get("Namespace", "", "kube-system")
        except KubeError as error:
            if error.code in (401, 403):
                words = f"cannot read the namespace kube-system ({error}); name the cluster with --cluster"
                raise SystemExit(words) from error
            log.warning("waiting for the API server: %s", error)
            await asyncio.sleep(2)
            continue
        if body is None:
            raise SystemExit("there is no namespace kube-system; name the cluster with --cluster")
        return str(body["metadata"]["uid"])


def _own_namespace() -> str:
    """Return where the operator's pod is; empty outside of a cluster."""
    try:
        return _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _uses(job: Job, site: str) -> bool:
    for pool in job.spec.get("pools") or ():
        if isinstance(pool, Mapping) and ((pool.get("hpc") or {}).get("siteRef") or {}).get("name") == site:
            return True
    return False
