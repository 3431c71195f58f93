"""``isthmus model get``: download of a job's newest or best model, from the aggregator's pod or its volume."""

import hashlib
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .api import Cluster, ClusterError

STATE_DIR = "/var/lib/isthmus"
READY_SECONDS = 120.0
USER = 65532


def get_model(
    cluster: Cluster, job: str, target: Path | None, report: Callable[[str], None], *, best: bool = False
) -> Path:
    """Download the model to a file, and return its path. The content is checked against the status' SHA-256.

    Raises :class:`ClusterError` or ``OSError``.
    """
    body = cluster.job(job)
    model = (body.get("status") or {}).get("bestModel" if best else "model")
    if not model and best:
        metric = ((body["spec"].get("objective") or {}).get("metric")) or "accuracy"
        raise ClusterError(
            f"job {job} has no best model: most of its clients have not reported {metric}, its objective.metric"
        )
    if not model:
        raise ClusterError(f"job {job} has no model yet; see isthmus status {job}")
    kind, _, rest = str(model["uri"]).partition("://")
    _, where, path = rest.split("/", 2)
    aggregator = cluster.get("pods", f"{job}-aggregator")
    running = aggregator is not None and (aggregator.get("status") or {}).get("phase") == "Running"
    if kind == "pod":
        if not running:
            raise ClusterError(f"the model was deleted with the pod {where}, since checkpoint.storage is EmptyDir")
        data = cluster.read_file(where, "aggregator", f"/{path}")
    elif running:
        data = cluster.read_file(f"{job}-aggregator", "aggregator", f"{STATE_DIR}/{path}")
    else:
        data = _from_volume(cluster, body, where, path, report)
    if hashlib.sha256(data).hexdigest() != model["sha256"]:
        raise ClusterError(
            "the file does not match the SHA-256 in the job's status; a newer round may have been committed: try again"
        )
    target = target or Path(f"{job}-round-{model['round']}{Path(path).suffix}")
    target.write_bytes(data)
    return target


def _from_volume(cluster: Cluster, job: dict[str, Any], claim: str, path: str, report: Callable[[str], None]) -> bytes:
    """Read a file from a claim, through a short-lived pod that mounts it, after the aggregator has ended."""
    name = f"{job['metadata']['name']}-reader-{uuid.uuid4().hex[:5]}"
    report(f"reading the volume {claim} with a pod {name}")
    cluster.create(reader_pod(name, job, claim))
    try:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            status = (cluster.get("pods", name) or {}).get("status") or {}
            if status.get("phase") == "Running":
                break
            if status.get("phase") == "Failed" or time.monotonic() > deadline:
                raise ClusterError(f"the pod {name} does not start; see kubectl describe pod {name}")
            time.sleep(0.3)
        return cluster.read_file(name, "reader", f"/model/{path}")
    finally:
        cluster.delete("pods", name)


def reader_pod(name: str, job: dict[str, Any], claim: str) -> dict[str, Any]:
    """Return a pod that mounts the claim read-only, ends by itself, and meets the restricted Pod Security Standard."""
    spec = job["spec"]
    template = ((spec.get("aggregator") or {}).get("template") or {}).get("spec") or {}
    passed_on = {key: template[key] for key in ("nodeSelector", "tolerations", "imagePullSecrets") if key in template}
    user = (template.get("securityContext") or {}).get("runAsUser", USER)  # files are private to it
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            **passed_on,
            "restartPolicy": "Never",
            "activeDeadlineSeconds": 600,
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True, "runAsUser": user, "runAsGroup": USER, "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "reader",
                    "image": (spec.get("aggregator") or {}).get("image") or spec["task"]["image"],
                    "command": ["sleep", "600"],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [{"name": "model", "mountPath": "/model", "readOnly": True}],
                }
            ],
            "volumes": [{"name": "model", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}],
        },
    }  # fmt: skip
