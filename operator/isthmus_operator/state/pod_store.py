"""The cache of all jobs' pods, fed by the watch, by responses to creations, and by lists.

The watch alone is not enough: its event may arrive long after the response to a pod's creation, and it may miss a
deletion while it is down. So responses are stored at once, and lists remove pods that no longer exist: periodically,
and after every restart of the watch.
"""

import datetime as dt
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from isthmus_contracts import identities as ids

from .. import names
from ..text import last_lines
from .observed import ENDED_PHASES, PodView
from .timestamps import parse_timestamp

_CONTAINERS = {names.ROLE_AGGREGATOR: "aggregator", names.ROLE_CLIENT: "client"}
# Reasons of a container that the kubelet or the runtime lost: they say nothing about its program.
_LOST_SIGHT = ("ContainerStatusUnknown", "Unknown")
_NODE_IS_SHORT = "The node was low on resource"
_ON_THE_WAY = {"", "ContainerCreating", "PodInitializing"}
# Volume sources that must exist before a pod starts: field, key of the name, and kind.
_MOUNTED = (
    ("secret", "secretName", "Secret"),
    ("secret", "name", "Secret"),  # in a projected volume
    ("configMap", "name", "ConfigMap"),
    ("persistentVolumeClaim", "claimName", "PersistentVolumeClaim"),
)
_REMEMBERED = 10_000  # uids of deleted pods

_JobKey = tuple[str, str]  # a job's namespace and uid


class PodStore:
    """Views of pods by job and pod name. Labels do not prove ownership, since anyone can set them in any namespace."""

    def __init__(self, now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC)) -> None:
        self._now = now
        self._pods: dict[_JobKey, dict[str, PodView]] = {}
        self._gone: dict[str, None] = {}  # uids, oldest first: late news must not restore them
        self._stale: set[str] = set()

    def knows(self, body: Mapping[str, Any]) -> bool:
        """Return True if this pod, by its uid, is known."""
        known = self._pods.get(_key_of(body), {}).get(str(body["metadata"]["name"]))
        return known is not None and known.uid == body["metadata"]["uid"]

    def mark_stale(self, job_uid: str) -> None:
        """Note that the watch may have missed changes of a job's pods."""
        self._stale.add(job_uid)

    def take_stale(self, job_uid: str) -> bool:
        """Return True if the job's pods must be listed, and clear the mark."""
        due = job_uid in self._stale
        self._stale.discard(job_uid)
        return due

    def count(self) -> int:
        """Return the number of known pods."""
        return sum(map(len, list(self._pods.values())))

    def of(self, namespace: str, job_uid: str) -> tuple[PodView, ...]:
        """Return the pods of a job."""
        return tuple(self._pods.get((namespace, job_uid), {}).values())

    def put(self, body: Mapping[str, Any]) -> None:
        """Store a pod unless it belongs to no job or a newer version is known."""
        key, pod = _key_of(body), view(body)
        known = self._pods.get(key, {}).get(pod.name)
        known = known if known is not None and known.uid == pod.uid else None
        # A known pod is kept when its owner reference is removed, as ``kubectl delete --cascade=orphan`` does.
        if pod.uid in self._gone or (known is None and not belongs_to(body, key[1])):
            return
        if known is None or _newer(pod, known):
            kept = replace(pod, finished=self._finished(pod, known)) if pod.ended else pod
            self._pods.setdefault(key, {})[pod.name] = kept

    def _finished(self, pod: PodView, known: PodView | None) -> dt.datetime:
        """Return when a pod ended by the operator's clock, from which pauses count: the node's may be wrong."""
        if known is not None and known.finished is not None:
            return known.finished
        now = self._now()
        # Only the node knows when a pod ended that was first seen ended.
        return now if known is not None else min(pod.finished or now, now)

    def drop(self, body: Mapping[str, Any]) -> None:
        """Remove a deleted pod."""
        metadata = body.get("metadata") or {}
        self._forget(_key_of(body), str(metadata.get("name")), str(metadata.get("uid")))

    def replace(
        self, namespace: str, job_uid: str, bodies: Iterable[Mapping[str, Any]], known_before: Iterable[str]
    ) -> None:
        """Store a list of all pods of a job. ``known_before``: uids known when the list was requested."""
        seen = set()
        for body in bodies:
            seen.add(str(body["metadata"]["uid"]))
            self.put(body)
        ghosts = set(known_before) - seen
        for pod in self.of(namespace, job_uid):
            if pod.uid in ghosts:
                self._forget((namespace, job_uid), pod.name, pod.uid)

    def forget_all_but(self, job_uids: Collection[str]) -> None:
        """Forget pods of other jobs. If a job is merely not known yet, its first reconciliation lists its pods."""
        for key in [key for key in self._pods if key[1] not in job_uids]:
            del self._pods[key]
        self._stale.intersection_update(job_uids)

    def _forget(self, key: _JobKey, name: str, uid: str) -> None:
        self._gone[uid] = None
        while len(self._gone) > _REMEMBERED:
            del self._gone[next(iter(self._gone))]
        pods = self._pods.get(key, {})
        if name in pods and pods[name].uid == uid:
            del pods[name]
        if not pods:
            self._pods.pop(key, None)


def job_uid_of(body: Mapping[str, Any]) -> str:
    """Return the uid of the job in an object's labels."""
    return str(((body.get("metadata") or {}).get("labels") or {}).get(ids.LABEL_JOB_UID, ""))


def belongs_to(body: Mapping[str, Any], job_uid: str) -> bool:
    """Return True if both labels and owner name the job: a copy made by hand has only the labels."""
    owners = (body.get("metadata") or {}).get("ownerReferences") or ()
    return bool(job_uid) and job_uid_of(body) == job_uid and any(owner.get("uid") == job_uid for owner in owners)


def job_of(body: Mapping[str, Any]) -> tuple[str, str]:
    """Return namespace and name of the job that an object belongs to."""
    metadata = body.get("metadata") or {}
    return str(metadata.get("namespace", "")), str((metadata.get("labels") or {}).get(ids.LABEL_JOB, ""))


def _key_of(body: Mapping[str, Any]) -> _JobKey:
    return job_of(body)[0], job_uid_of(body)


def view(body: Mapping[str, Any]) -> PodView:
    """Reduce a pod to what the plan reads."""
    metadata, status = body["metadata"], body.get("status") or {}
    labels = metadata.get("labels") or {}
    role = labels.get(ids.LABEL_ROLE, "")
    container = _container(status, _CONTAINERS.get(role, role))
    state = container.get("state") or {}
    ended, last = state.get("terminated") or {}, _last_end(container)
    conditions = {item.get("type"): item for item in status.get("conditions") or ()}
    reported = str(status.get("phase") or "Pending")
    phase = _phase(reported, status, role, ended)
    target = conditions.get("DisruptionTarget", {})
    disrupted = target.get("status") == "True"
    if phase == "Failed" and not ended:
        ended = _failed_init(status)
    placed = _placed(reported, status, conditions)
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        role=role,
        pool=labels.get(ids.LABEL_POOL, ""),
        index=_number(labels.get(ids.LABEL_INDEX)),
        attempt=_number(labels.get(ids.LABEL_ATTEMPT)),
        phase=phase,
        lingers=phase in ENDED_PHASES and reported not in ENDED_PHASES,
        deleting=metadata.get("deletionTimestamp") is not None,
        # The deletion timestamp includes the grace period.
        overdue=parse_timestamp(metadata.get("deletionTimestamp")),
        ready=conditions.get("Ready", {}).get("status") == "True",
        created=parse_timestamp(metadata.get("creationTimestamp")),
        finished=_finished(status, ended, conditions) if phase in ENDED_PHASES else None,
        exit_code=ended.get("exitCode"),
        reason=str(status.get("reason") or ended.get("reason") or (target.get("reason") if disrupted else "") or ""),
        message=str(
            ended.get("message") or status.get("message") or (target.get("message") if disrupted else "") or ""
        ),
        disrupted=disrupted or _ended_by_the_cluster(status, ended),
        waiting=_waiting(status, container, conditions),
        placed=placed,
        mounts=_mounts(body.get("spec") or {}) if placed is not None else (),
        restarts=int(container.get("restartCount") or 0),
        last_exit_code=last.get("exitCode"),
        last_message=str(last.get("message") or ""),
        ip=str(status.get("podIP") or ""),
        host_ip=str(status.get("hostIP") or ""),
        node=str((body.get("spec") or {}).get("nodeName") or ""),
        authority=str((metadata.get("annotations") or {}).get(names.ANNOTATION_AUTHORITY, "")),
        resource_version=str(metadata.get("resourceVersion", "")),
    )


def _phase(reported: str, status: Mapping[str, Any], role: str, ended: Mapping[str, Any]) -> str:
    """Return the phase of a pod's main program, which may end before its sidecars, or with another result.

    Kubernetes reports the phase of all containers together. Without sidecars that phase follows soon, and is exact.
    """
    alone = len(status.get("containerStatuses") or ()) < 2
    if alone or "exitCode" not in ended:
        return reported
    if ended["exitCode"] == 0:
        return "Succeeded"
    # The kubelet restarts the aggregator's container.
    return reported if role == names.ROLE_AGGREGATOR else "Failed"


def _ended_by_the_cluster(status: Mapping[str, Any], ended: Mapping[str, Any]) -> bool:
    """Return True if a kubelet or a controller ended a pod, rather than its program.

    Only these set a pod's own ``status.reason``: a kubelet that refuses it (before any container started), evicts it or
    shuts down, or the node controller. A program that fails leaves it empty, and shows in its container's state. The
    exceptions are limits that the manifest itself sets.
    """
    if ended.get("reason") in _LOST_SIGHT:
        return True
    return status.get("reason") not in (None, "", "DeadlineExceeded") and not _own_excess(status)


def _own_excess(status: Mapping[str, Any]) -> bool:
    """Return True if the kubelet evicted a pod for exceeding its own limit.

    The message starts with the node's shortage if that was the cause.
    """
    message = str(status.get("message") or "")
    return status.get("reason") == "Evicted" and "exceed" in message and not message.startswith(_NODE_IS_SHORT)


def _container(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Iterable[Mapping[str, Any]] = status.get("containerStatuses") or ()
    return next((item for item in found if item.get("name") == name), {})


def _finished(
    status: Mapping[str, Any], ended: Mapping[str, Any], conditions: Mapping[Any, Mapping[str, Any]]
) -> dt.datetime | None:
    times = (ended.get("finishedAt"), conditions.get("Ready", {}).get("lastTransitionTime"), status.get("startTime"))
    return next((moment for text in times if (moment := parse_timestamp(text)) is not None), None)


def _waiting(status: Mapping[str, Any], main: Mapping[str, Any], conditions: Mapping[Any, Mapping[str, Any]]) -> str:
    """Return why a pod does not run: the scheduler's message, or that of its first container that cannot start.

    Empty while it is merely starting.
    """
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return f"{scheduled.get('reason', 'Unschedulable')}: {scheduled.get('message', '')}".rstrip(": ")
    if words := _held_up(main):
        return words
    for field, kind in (("initContainerStatuses", "init container"), ("containerStatuses", "container")):
        for item in status.get(field) or ():
            if item.get("name") != main.get("name") and (words := _held_up(item)):
                return f"{kind} {item.get('name')}: {words}"
    if status.get("phase") not in ENDED_PHASES and (ended := _failed_init(status)):
        return str(ended["message"])
    return ""


def _held_up(container: Mapping[str, Any]) -> str:
    waiting = (container.get("state") or {}).get("waiting") or {}
    reason = str(waiting.get("reason") or "")
    if reason in _ON_THE_WAY:
        return ""
    last = _last_end(container)
    ended = f"it ended with exit code {last['exitCode']}" if last.get("exitCode") else ""
    words = (reason, str(waiting.get("message") or ""), ended, last_lines(str(last.get("message") or ""), 3))
    return ": ".join(filter(None, words))


def _last_end(container: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (container.get("lastState") or {}).get("terminated") or {}
    return found


def _failed_init(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return the end of the first failed init container, whose message names it; empty if none failed."""
    for item in status.get("initContainerStatuses") or ():
        ended = (item.get("state") or {}).get("terminated") or {}
        if ended.get("exitCode"):
            words = f"init container {item.get('name')} failed with exit code {ended['exitCode']}"
            return {**ended, "message": ": ".join(filter(None, (words, str(ended.get("message") or ""))))}
    return {}


def _placed(
    reported: str, status: Mapping[str, Any], conditions: Mapping[Any, Mapping[str, Any]]
) -> dt.datetime | None:
    """Return when a pod was scheduled, if none of its containers has started since."""
    containers = (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ()))
    begun = any((item.get("state") or {}).keys() & {"running", "terminated"} for item in containers)
    scheduled = conditions.get("PodScheduled", {})
    if reported != "Pending" or begun or scheduled.get("status") != "True":
        return None
    return parse_timestamp(scheduled.get("lastTransitionTime"))


def _mounts(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the objects that a pod's template mounts, without the operator's own."""
    found: list[str] = []
    for volume in spec.get("volumes") or ():
        if str(volume.get("name", "")).startswith(names.VOLUME_PREFIX):
            continue
        sources = [volume, *((volume.get("projected") or {}).get("sources") or ())]
        for source in sources:
            for field, key, kind in _MOUNTED:
                if name := (source.get(field) or {}).get(key):
                    found.append(f"{kind} {name}")
    return tuple(found)


def _newer(pod: PodView, known: PodView) -> bool:
    try:
        return int(pod.resource_version) >= int(known.resource_version)
    except ValueError:
        return True


def _number(text: object) -> int:
    return int(text) if isinstance(text, str) and text.isascii() and text.isdigit() else 0
