"""The operator's components and their wiring."""

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
from .effects.signing_root import DEFAULT_NAME as SIGNING_ROOT
from .effects.signing_root import SigningRoot
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
    """All components of the operator, with its lifetime."""

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
        """Connect, and start the queues and servers. Return once the CRDs are installed."""
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
        where, _, secret = (settings.signing_root or f"{options.namespace}/{SIGNING_ROOT}").partition("/")
        signing_root = SigningRoot(kube, cluster, where, secret)
        observer = Observer(kube, self.pods, self.sites, bridges, aggregators, options, signing_root)
        holds = SiteHolds(kube, self.jobs, self.sites)
        effects = Effects(kube, self.jobs, self.pods, bridges, holds)
        logs = TaskLogs(kube, bridges, cluster)
        jobs = JobReconciler(self.jobs, self.pods, observer, effects, aggregators, holds, logs, options, self.clock)
        sites = SiteReconciler(kube, self.sites, bridges, holds, signing_root, self.site_changed, settings.resync)
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
        """Stop at once; the next operator resumes unfinished work."""
        await asyncio_tasks.end(self._tasks)
        for part in self._stops:
            closed = part.close()
            if closed is not None:
                await closed

    def _reconcile_served(self, jobs: JobReconciler) -> Callable[[Key], Awaitable[float | None]]:
        """Return the reconcile function, which skips jobs in refused namespaces."""

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
        """Store a FederatedJob, and queue it if it changed."""
        if body["metadata"]["namespace"] in self.settings.excluded:
            return
        if self.jobs.put(body):
            self.queue.add((body["metadata"]["namespace"], body["metadata"]["name"]))

    def job_gone(self, key: Key, uid: str) -> None:
        """Remove a deleted FederatedJob, and queue its clean-up."""
        self.jobs.drop(key, uid)
        self.queue.add(key)

    def site_seen(self, body: Mapping[str, Any]) -> None:
        """Store an HPCSite, and queue a poll if its spec changed."""
        if self.sites.put(body):
            name = body["metadata"]["name"]
            self.site_changed(name)
            self.site_queue.add(name)

    def site_gone(self, name: str) -> None:
        """Remove a deleted HPCSite."""
        self.sites.drop(name)
        self.site_changed(name)
        self.site_queue.add(name)

    def site_changed(self, name: str) -> None:
        """Queue the jobs that use a site, and close its tunnel if it no longer dials out."""
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
        """Handle the end of a task that should never end: the liveness probe restarts the operator."""
        if not task.cancelled():
            log.critical("a task of the operator ended unexpectedly", exc_info=task.exception())
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
    """Wait until the CRDs are installed, since kopf would not notice them later."""
    warned = False
    while True:
        try:
            await kube.probe(f"/apis/{ids.API_VERSION}")
            return
        except KubeError as error:
            if not warned:
                log.warning("waiting for the API %s: %s", ids.API_VERSION, error)
                warned = True
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
    """Return the namespace of the operator's own pod; empty outside a cluster."""
    try:
        return _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _uses(job: Job, site: str) -> bool:
    for pool in job.spec.get("pools") or ():
        if isinstance(pool, Mapping) and ((pool.get("hpc") or {}).get("siteRef") or {}).get("name") == site:
            return True
    return False
