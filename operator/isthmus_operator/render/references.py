"""The Secrets, ConfigMaps and claims that a pod template names, and whether it is allowed to.

A pod can read them with rights that its author may lack. So Isthmus' own objects are refused: other jobs' keys, files,
logs and models.
"""

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from isthmus_contracts import identities as ids

from .. import names

SECRET, CONFIG_MAP, CLAIM = "Secret", "ConfigMap", "PersistentVolumeClaim"
# Fields whose value contains the name under one of ``_KEYS``.
_FIELDS = {
    "secret": SECRET, "secretRef": SECRET, "secretKeyRef": SECRET, "nodePublishSecretRef": SECRET, "azureFile": SECRET,
    "configMap": CONFIG_MAP, "configMapRef": CONFIG_MAP, "configMapKeyRef": CONFIG_MAP,
    "persistentVolumeClaim": CLAIM,
}  # fmt: skip
_KEYS = ("name", "secretName", "claimName")
# The names of Isthmus' own objects, see names.py.
_OURS = {
    SECRET: re.compile(r".+-(ca|tls(-\d+)?)"),
    CONFIG_MAP: re.compile(r".+-(job|log|code)"),
    CLAIM: re.compile(r".+-checkpoints"),
}
_OPTIONS = {SECRET: "secret=", CONFIG_MAP: "config-map="}
_FLAGS = {SECRET: "--secrets-in-templates", CONFIG_MAP: "--config-maps-in-templates"}


def references(template: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield field, kind and name of each object that a template names."""
    if isinstance(template, Mapping):
        for key, value in template.items():
            where = f"{path}.{key}" if path else str(key)
            kind = _FIELDS.get(str(key))
            if kind is not None and isinstance(value, Mapping):
                for field in _KEYS:
                    if isinstance(value.get(field), str) and value[field]:
                        yield f"{where}.{field}", kind, value[field]
            if key != "imagePullSecrets":  # only the kubelet reads these Secrets
                yield from references(value, where)
    elif isinstance(template, list):
        for number, item in enumerate(template):
            yield from references(item, f"{path}[{number}]")


def not_allowed(template: Any, allowed: frozenset[str]) -> Iterator[str]:
    """Yield a problem for each object that a template names and the admin's lists do not allow."""
    for path, kind, name in references(template):
        option = _OPTIONS.get(kind, "")
        globs = [item.removeprefix(option) for item in allowed if option and item.startswith(option)]
        if globs and not any(fnmatchcase(name, glob) for glob in globs):
            yield f"{path}: the {kind} {name!r} is not allowed here; the platform's admin can allow it ({_FLAGS[kind]})"


def forbidden_reason(kind: str, name: str, body: Mapping[str, Any] | None, job: str, job_uid: str) -> str:
    """Return why a job's template may not name an object; empty if it may. ``body``: None if it does not exist."""
    if body is None:
        # It could be created for another job after this check.
        own = kind == CLAIM and name == names.checkpoints(job)
        if own or not _OURS[kind].fullmatch(name):
            return ""
        return (
            f"the {kind} {name!r} does not exist, and its name is reserved for Isthmus' own objects:"
            " create it first, or choose another name"
        )
    labels = (body.get("metadata") or {}).get("labels") or {}
    if labels.get(ids.LABEL_JOB_UID) == job_uid and kind != SECRET:
        return ""
    ours = labels.get(ids.LABEL_MANAGED_BY) == ids.MANAGED_BY or labels.get("app.kubernetes.io/name") == "isthmus"
    if ours or ids.LABEL_JOB_UID in labels:
        return f"the {kind} {name!r} is Isthmus' own: no template may name it"
    return ""
