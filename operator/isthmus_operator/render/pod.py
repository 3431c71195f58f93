"""The common parts of the aggregator's and the clients' pods."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from isthmus_contracts import identities as ids

from .. import names
from ..state.observed import Job
from .merge import TemplateError, merge_template

USER = 65532  # of the images; any other user works if it can read the mounted certificates through fsGroup
TLS_DIR = "/etc/isthmus/tls"
TLS_VOLUME = "isthmus-tls"
WORK_DIR = "/work"

_POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
_CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
_DEFAULT_ENV = (
    {"name": "HOME", "value": "/tmp"},  # noqa: S108 - in the container
    {"name": "PYTHONUNBUFFERED", "value": "1"},
)


def owner_reference(job: Job) -> dict[str, Any]:
    """Return the owner reference to the FederatedJob, with which owned objects are deleted."""
    return {
        "apiVersion": ids.API_VERSION,
        "kind": "FederatedJob",
        "name": job.name,
        "uid": job.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def metadata(job: Job, name: str, extra: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the metadata of an object of the job."""
    return {
        "name": name,
        "namespace": job.namespace,
        "labels": {
            **names.labels(job.name, job.uid),
            **(extra or {}),
            # Kueue admits single pods, so only pods have its label.
            **({ids.LABEL_QUEUE: job.queue} if job.queue and ids.LABEL_ROLE in (extra or {}) else {}),
        },
        "ownerReferences": [owner_reference(job)],
    }


def owned(job: Job, kind: str, name: str, content: Mapping[str, Any], group: str = "v1") -> dict[str, Any]:
    """Return an object of the job. ``group``: its API version."""
    return {"apiVersion": group, "kind": kind, "metadata": metadata(job, name), **content}


def stamped(body: dict[str, Any]) -> dict[str, Any]:
    """Annotate an object with a hash of its content, by which later edits are recognized."""
    annotations = body["metadata"].get("annotations")
    content = [body["spec"], annotations] if annotations else body["spec"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    body["metadata"]["annotations"] = {**(annotations or {}), names.ANNOTATION_RENDERED: digest}
    return body


def base_spec(container: Mapping[str, Any], tls_secret: str, restart: str) -> dict[str, Any]:
    """Return a pod spec that meets the restricted Pod Security Standard."""
    return {
        "restartPolicy": restart,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": dict(_POD_SECURITY),
        "containers": [
            {
                "workingDir": WORK_DIR,
                # Without a message of its own, the last lines of its output explain a failure.
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "securityContext": dict(_CONTAINER_SECURITY),
                **container,
                "env": list({item["name"]: item for item in (*_DEFAULT_ENV, *container.get("env", ()))}.values()),
                "volumeMounts": [
                    {"name": TLS_VOLUME, "mountPath": TLS_DIR, "readOnly": True},
                    {"name": "isthmus-tmp", "mountPath": "/tmp"},  # noqa: S108
                    {"name": "isthmus-work", "mountPath": WORK_DIR},
                    *container.get("volumeMounts", ()),
                ],
            }
        ],
        "volumes": [
            {"name": TLS_VOLUME, "secret": {"secretName": tls_secret, "defaultMode": 0o440}},
            {"name": "isthmus-tmp", "emptyDir": {}},
            {"name": "isthmus-work", "emptyDir": {}},
        ],
    }


def lay_code(spec: dict[str, Any], job: Job, files: Sequence[str]) -> None:
    """Mount the job's files one by one into the working directory, so that the rest of it stays writable."""
    if not files:
        return
    spec["volumes"].append({"name": "isthmus-code", "configMap": {"name": names.code(job.name)}})
    (container,) = spec["containers"]
    container["volumeMounts"] += [
        {"name": "isthmus-code", "mountPath": f"{WORK_DIR}/{name}", "subPath": name, "readOnly": True} for name in files
    ]


def finish(
    pod_metadata: dict[str, Any],
    spec: dict[str, Any],
    template: Mapping[str, Any],
    container: str,
    reserved_env: Sequence[Mapping[str, str]],
    defaults: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Merge the admin's ``defaults`` and the user's template into a pod, and restore what templates may not change.

    Raises :class:`TemplateError`.
    """
    refuse_reserved(template)
    pod: dict[str, Any] = {"metadata": pod_metadata, "spec": spec}
    for one in (*defaults, template):
        pod = merge_template(pod, one, container)
    pod["metadata"]["labels"] = {**(pod["metadata"].get("labels") or {}), **pod_metadata["labels"]}
    annotations = {**(pod["metadata"].get("annotations") or {}), **pod_metadata.get("annotations", {})}
    pod["metadata"]["annotations"] = annotations
    pod["spec"]["restartPolicy"] = spec["restartPolicy"]
    main = next(item for item in pod["spec"]["containers"] if item["name"] == container)
    env = [item for item in main.get("env") or [] if not item["name"].startswith(ids.RESERVED_ENV_PREFIX)]
    main["env"] = [*env, *reserved_env]
    for kind in ("containers", "initContainers"):
        for added in pod["spec"].get(kind) or ():
            _harden(added, f"spec.{kind}[{added['name']}]")
    return {"apiVersion": "v1", "kind": "Pod", **pod}


def _harden(container: dict[str, Any], path: str) -> None:
    """Apply the restricted standard to a container that a template adds, unless the template overrides it."""
    security = container.get("securityContext")
    if security is None or isinstance(security, Mapping):
        base = {key: _CONTAINER_SECURITY[key] for key in ("allowPrivilegeEscalation", "capabilities")}
        container["securityContext"] = {**base, **(security or {})}
        _check_capabilities(container["securityContext"].get("capabilities"), f"{path}.securityContext.capabilities")


def _check_capabilities(capabilities: Any, path: str) -> None:
    for field, names_ in capabilities.items() if isinstance(capabilities, Mapping) else ():
        if names_ is not None and not (isinstance(names_, list) and all(isinstance(name, str) for name in names_)):
            raise TemplateError(f"{path}.{field}: must be a list of strings")


def refuse_reserved(template: Mapping[str, Any]) -> None:
    """Raise ``TemplateError`` if a template sets what would be restored silently."""
    spec = template.get("spec")
    if not isinstance(spec, Mapping):
        return
    for number, volume in enumerate(_items(spec, "volumes")):
        if str(volume.get("name", "")).startswith(names.VOLUME_PREFIX):
            raise TemplateError(
                f"spec.volumes[{number}].name: names that begin with {names.VOLUME_PREFIX} are reserved"
            )
    for kind in ("containers", "initContainers"):
        for number, container in enumerate(_items(spec, kind)):
            path = f"spec.{kind}[{number}]"
            for item, env in enumerate(_items(container, "env")):
                if str(env.get("name", "")).startswith(ids.RESERVED_ENV_PREFIX):
                    raise TemplateError(
                        f"{path}.env[{item}].name: names that begin with {ids.RESERVED_ENV_PREFIX} are reserved"
                    )
            for item, mount in enumerate(_items(container, "volumeMounts")):
                if str(mount.get("mountPath", "")).rstrip("/") == TLS_DIR:
                    raise TemplateError(f"{path}.volumeMounts[{item}].mountPath: {TLS_DIR} is reserved")
    if spec.get("restartPolicy") is not None:
        raise TemplateError("spec.restartPolicy: is set by Isthmus")


def _items(mapping: Any, key: str) -> list[Mapping[str, Any]]:
    value = mapping.get(key) if isinstance(mapping, Mapping) else None
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
