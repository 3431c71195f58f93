"""``isthmus logs``: the log of a pod, or of a Slurm task through the operator and the site's bridge."""

import json
import time
import uuid
from collections.abc import Callable, Iterator

from isthmus_contracts import identities as ids

from .api import Cluster, ClusterError

RESPONSE_SECONDS = 60.0
_POLL_SECONDS = 0.3
_FOLLOW_SECONDS = 3.0


def logs(cluster: Cluster, job: str, who: str, *, lines: int | None, follow: bool) -> Iterator[bytes]:
    """Return the log of ``aggregator``, or of a client as ``POOL/INDEX``. Raises :class:`ClusterError`."""
    body = cluster.job(job)
    pools = {pool["name"]: pool for pool in body["spec"].get("pools") or ()}
    if who == "aggregator":
        return cluster.follow(f"{job}-aggregator", "aggregator", lines=lines, follow=follow)
    name, _, number = who.partition("/")
    if name not in pools or not (number or "0").isdigit():
        names = ", ".join(f"{pool}/0" for pool in pools)
        raise ClusterError(f"{who!r} is not part of this job; give aggregator, or POOL/INDEX such as {names}")
    index = int(number or 0)
    if index >= int(pools[name].get("replicas", 1)):
        raise ClusterError(f"pool {name} has {pools[name].get('replicas', 1)} clients; there is no index {index}")
    if "cloud" in pools[name]:
        return cluster.follow(_newest(cluster, job, name, index), "client", lines=lines, follow=follow)
    return slurm_log(cluster, job, name, index, lines=lines or 0, follow=follow)


def slurm_log(
    cluster: Cluster,
    job: str,
    pool: str,
    index: int,
    *,
    lines: int,
    follow: bool,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[bytes]:
    """Yield the end of a task's log; with ``follow``, poll it and yield new lines until the job ends."""
    before: list[str] = []
    while True:
        text = _request(cluster, job, pool, index, lines or (1000 if follow else 0), pause).splitlines(keepends=True)
        yield "".join(_new(before, text)).encode()
        if not follow or _has_ended(cluster, job):
            return
        before = text
        pause(_FOLLOW_SECONDS)


def _request(cluster: Cluster, job: str, pool: str, index: int, lines: int, pause: Callable[[float], None]) -> str:
    request = {"id": uuid.uuid4().hex, "pool": pool, "index": index, "lines": lines}
    cluster.annotate(job, {ids.ANNOTATION_LOG_REQUEST: json.dumps(request)})
    deadline = time.monotonic() + RESPONSE_SECONDS
    while time.monotonic() < deadline:
        found = cluster.get("configmaps", ids.log_answer(job)) or {}
        if found and (found["metadata"].get("labels") or {}).get(ids.LABEL_JOB) != job:
            raise ClusterError(
                f"the ConfigMap {ids.log_answer(job)} exists and does not belong to this job:"
                " the operator cannot store the log in it; rename or delete it, and try again"
            )
        reply = found.get("data") or {}
        if reply.get("id") == request["id"]:
            if reply.get("error"):
                raise ClusterError(str(reply["error"]))
            return str(reply.get("log", ""))
        pause(_POLL_SECONDS)
    raise ClusterError(f"the operator did not respond within {RESPONSE_SECONDS:.0f} s")


def _new(before: list[str], now: list[str]) -> list[str]:
    """Return the lines of ``now`` that follow ``before``; both are the end of one growing log."""
    for overlap in range(min(len(before), len(now)), 0, -1):
        if before[-overlap:] == now[:overlap]:
            return now[overlap:]
    return now


def _has_ended(cluster: Cluster, job: str) -> bool:
    from .tables import has_ended

    return has_ended(cluster.job(job))


def _newest(cluster: Cluster, job: str, pool: str, index: int) -> str:
    """Return the name of a client's newest pod."""

    def attempt(labels: dict[str, str]) -> int:
        return int(labels.get(ids.LABEL_ATTEMPT, "0"))

    pods = [
        item["metadata"]
        for item in cluster.pods(job)
        if item["metadata"]["labels"].get(ids.LABEL_POOL) == pool
        and item["metadata"]["labels"].get(ids.LABEL_INDEX) == str(index)
    ]
    if not pods:
        raise ClusterError(f"client {pool}/{index} has no pod (yet); see isthmus status {job}")
    return str(max(pods, key=lambda item: attempt(item["labels"]))["name"])
