"""``isthmus logs``: of a pod, or of a Slurm task by way of the operator and the site's bridge."""

import json
import time
import uuid
from collections.abc import Callable, Iterator

from isthmus_contracts import identities as ids

from .api import Cluster, ClusterError

ANSWER_SECONDS = 60.0
_POLL_SECONDS = 0.3
_FOLLOW_SECONDS = 3.0


def logs(cluster: Cluster, job: str, who: str, *, lines: int | None, follow: bool) -> Iterator[bytes]:
    """The log of ``aggregator``, or of a client as ``POOL/INDEX``. Raises :class:`ClusterError`."""
    body = cluster.job(job)
    pools = {pool["name"]: pool for pool in body["spec"].get("pools") or ()}
    if who == "aggregator":
        return cluster.follow(f"{job}-aggregator", "aggregator", lines=lines, follow=follow)
    name, _, number = who.partition("/")
    if name not in pools or not (number or "0").isdigit():
        names = ", ".join(f"{pool}/0" for pool in pools)
        raise ClusterError(f"{who!r} is none of this job's; give aggregator, or POOL/INDEX such as {names}")
    index = int(number or 0)
    if index >= int(pools[name].get("replicas", 1)):
        raise ClusterError(f"pool {name} has {pools[name].get('replicas', 1)} clients; there is no {index}")
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
    """Asks for the end of a task's log; following, again and again, and shows what is new."""
    before: list[str] = []
    while True:
        text = _ask(cluster, job, pool, index, lines or (1000 if follow else 0), pause).splitlines(keepends=True)
        yield "".join(_new(before, text)).encode()
        if not follow or _over(cluster, job):
            return
        before = text
        pause(_FOLLOW_SECONDS)


def _ask(cluster: Cluster, job: str, pool: str, index: int, lines: int, pause: Callable[[float], None]) -> str:
    request = {"id": uuid.uuid4().hex, "pool": pool, "index": index, "lines": lines}
    cluster.annotate(job, {ids.ANNOTATION_LOG_REQUEST: json.dumps(request)})
    until = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < until:
        found = cluster.get("configmaps", ids.log_answer(job)) or {}
        if found and (found["metadata"].get("labels") or {}).get(ids.LABEL_JOB) != job:
            raise ClusterError(
                f"the ConfigMap {ids.log_answer(job)} exists and is not of this job: the operator cannot answer there; "
                "rename or delete it, and ask again"
            )
        answer = found.get("data") or {}
        if answer.get("id") == request["id"]:
            if answer.get("error"):
                raise ClusterError(str(answer["error"]))
            return str(answer.get("log", ""))
        pause(_POLL_SECONDS)
    raise ClusterError(f"the operator has not answered within {ANSWER_SECONDS:.0f} s")


def _new(before: list[str], now: list[str]) -> list[str]:
    """The lines of ``now`` that follow on ``before``: both are the ends of one growing log."""
    for overlap in range(min(len(before), len(now)), 0, -1):
        if before[-overlap:] == now[:overlap]:
            return now[overlap:]
    return now


def _over(cluster: Cluster, job: str) -> bool:
    from .tables import over

    return over(cluster.job(job))


def _newest(cluster: Cluster, job: str, pool: str, index: int) -> str:
    """The newest pod of a client."""

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
