"""The files of ``task.code`` in ConfigMaps."""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from isthmus_contracts import identities as ids
from isthmus_contracts.manifests.code_files import check_files

from .. import names
from ..render.pod import owned
from ..state.observed import Job


def files_of(config_map: Mapping[str, Any] | None) -> dict[str, bytes]:
    """Return the files of a ConfigMap, without those that do not decode."""
    found = {str(name): str(text).encode() for name, text in ((config_map or {}).get("data") or {}).items()}
    for name, text in ((config_map or {}).get("binaryData") or {}).items():
        try:
            found[str(name)] = base64.b64decode(text, validate=True)
        except (binascii.Error, TypeError, ValueError):
            continue
    return found


def copy(job: Job, source: str, config_map: Mapping[str, Any] | None) -> dict[str, Any] | str:
    """Return the job's own copy of a ConfigMap, or a one-line error."""
    if config_map is None:
        return f"spec.task.code.configMapRef.name: there is no ConfigMap {source!r} in namespace {job.namespace}"
    if ids.LABEL_JOB_UID in ((config_map.get("metadata") or {}).get("labels") or {}):
        return f"spec.task.code: ConfigMap {source!r} is Isthmus' own: another job's files or logs are not copied"
    if problem := check_files(files_of(config_map)):
        return f"spec.task.code: ConfigMap {source!r}: {problem}"
    content = {key: config_map[key] for key in ("data", "binaryData") if config_map.get(key)}
    return owned(job, "ConfigMap", names.code(job.name), {**content, "immutable": True})
