"""Which Secrets, ConfigMaps and claims a pod template names.

The pod gets what they hold, whatever its author may read. So those that are Isthmus' own are refused: another job's
keys, files, logs and model.
"""

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from isthmus_contracts import identities as ids

from .. import names

SECRET, CONFIG_MAP, CLAIM = "Secret", "ConfigMap", "PersistentVolumeClaim"
# Fields whose value has the name in one of these keys.
_FIELDS = {
    "secret": SECRET, "secretRef": SECRET, "secretKeyRef": SECRET, "nodePublishSecretRef": SECRET, "azureFile": SECRET,
    "configMap": CONFIG_MAP, "configMapRef": CONFIG_MAP, "configMapKeyRef": CONFIG_MAP,
    "persistentVolumeClaim": CLAIM,
}  # fmt: skip
_KEYS = ("name", "secretName", "claimName")
# As names.py makes them.
_OURS = {
    SECRET: re.compile(r".+-(ca|tls(-\d+)?)"),
    CONFIG_MAP: re.compile(r".+-(job|log|code)"),
    CLAIM: re.compile(r".+-checkpoints"),
}
_OPTIONS = {SECRET: "secret=", CONFIG_MAP: "config-map="}
_FLAGS = {SECRET: "--secrets-in-templates", CONFIG_MAP: "--config-maps-in-templates"}


def references(template: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Each object that a template names: the field, its kind and its name."""
    if isinstance(template, Mapping):
        for key, value in template.items():
            where = f"{path}.{key}" if path else str(key)
            kind = _FIELDS.get(str(key))
            if kind is not None and isinstance(value, Mapping):
                for field in _KEYS:
                    if isinstance(value.get(field), str) and value[field]:
                        yield f"{where}.{field}", kind, value[field]
            if key != "imagePullSecrets":  # only the kubelet sees those
                yield from references(value, where)
    elif isinstance(template, list):
        for number, item in enumerate(template):
            yield from references(item, f"{path}[{number}]")


def not_allowed(template: Any, allowed: frozenset[str]) -> Iterator[str]:
    """What a template names and the admin's lists do not."""
    for path, kind, name in references(template):
        option = _OPTIONS.get(kind, "")
        globs = [item.removeprefix(option) for item in allowed if option and item.startswith(option)]
        if globs and not any(fnmatchcase(name, glob) for glob in globs):
            yield f"{path}: the {kind} {name!r} is not allowed here; the platform's admin can allow it ({_FLAGS[kind]})"


def verdict(kind: str, name: str, body: Mapping[str, Any] | None, job: str, job_uid: str) -> str:
    """Why an object may not be named in a job's template; empty where it may. ``body``: None where there is none."""
    if body is None:
        # It may come to be another job's after it was judged.
        own = kind == CLAIM and name == names.checkpoints(job)
        if own or not _OURS[kind].fullmatch(name):
            return ""
        return (
            f"the {kind} {name!r} does not exist, and is named as Isthmus' own are: make it first, or name it otherwise"
        )
    labels = (body.get("metadata") or {}).get("labels") or {}
    if labels.get(ids.LABEL_JOB_UID) == job_uid and kind != SECRET:
        return ""
    ours = labels.get(ids.LABEL_MANAGED_BY) == ids.MANAGED_BY or labels.get("app.kubernetes.io/name") == "isthmus"
    if ours or ids.LABEL_JOB_UID in labels:
        return f"the {kind} {name!r} is Isthmus' own: no template may name it"
    return ""
