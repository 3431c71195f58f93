"""Strategic merge of pod templates: maps deeply, and known lists by the key of their items."""

import copy
from collections.abc import Mapping
from typing import Any

_PORT = "containerPort"
# Lists that are merged item by item, with the field that identifies an item. Any other list is replaced.
_KEYED = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": _PORT,
    "imagePullSecrets": "name",
    "hostAliases": "ip",
}
_APPENDED = {"tolerations", "envFrom"}
_OWN_METADATA = ("labels", "annotations")


class TemplateError(ValueError):
    """A pod template cannot be merged. ``str()`` names the field."""


def merge(base: Any, patch: Any, path: str = "") -> Any:
    """Return ``base`` with ``patch`` merged into it, as new objects. A null in the patch removes the field."""
    if isinstance(patch, Mapping):
        if base is not None and not isinstance(base, Mapping):
            raise TemplateError(f"{path or 'template'}: must not be a mapping")
        result = dict(base or {})
        for key, value in patch.items():
            where = f"{path}.{key}" if path else str(key)
            if value is None:
                result.pop(key, None)
            else:
                result[key] = _field(str(key), result.get(key), value, where)
        return result
    if isinstance(base, Mapping):
        raise TemplateError(f"{path or 'template'}: must be a mapping")
    return copy.deepcopy(patch)


def merge_template(base: Mapping[str, Any], template: Mapping[str, Any], container: str) -> dict[str, Any]:
    """Return a pod with a template merged into it. ``container``: name of the main container.

    Raises :class:`TemplateError`.
    """
    for key in template:
        if key not in ("metadata", "spec"):
            raise TemplateError(f"{key}: unknown field; a pod template has metadata and spec")
    # An empty metadata or spec changes nothing.
    template = {key: value for key, value in template.items() if value is not None}
    for part, value in template.items():
        if not isinstance(value, Mapping):
            raise TemplateError(f"{part}: must be a mapping")
    for key in template.get("metadata") or {}:
        if key not in _OWN_METADATA:
            raise TemplateError(f"metadata.{key}: only labels and annotations can be set")
    result: dict[str, Any] = merge(base, template)
    spec = result["spec"]
    if all(item.get("name") != container for item in spec.get("containers") or ()):
        raise TemplateError(f"spec.containers: the container {container!r} cannot be removed")
    if not isinstance(spec.get("initContainers") or [], list):
        raise TemplateError("spec.initContainers: must be a list")
    _check_strings(result["metadata"])
    return result


def _field(key: str, base: Any, value: Any, path: str) -> Any:
    if isinstance(base, list) and not isinstance(value, list):
        raise TemplateError(f"{path}: must be a list")
    if isinstance(value, list) and (key in _KEYED or key in _APPENDED):
        if base is not None and not isinstance(base, list):
            raise TemplateError(f"{path}: must not be a list")
        return _appended(base or [], value) if key in _APPENDED else _keyed(base or [], value, _KEYED[key], path)
    return merge(base, value, path)


def _keyed(base: list[Any], patch: list[Any], key: str, path: str) -> list[Any]:
    result = {item[key]: item for item in base}
    for number, item in enumerate(patch):
        where = f"{path}[{number}]"
        if not isinstance(item, Mapping):
            raise TemplateError(f"{where}: must be a mapping")
        name = item.get(key)
        if name is None or name == "":
            raise TemplateError(f"{where}.{key}: is missing")
        if key == _PORT and (not isinstance(name, int) or isinstance(name, bool)):
            raise TemplateError(f"{where}.{key}: must be a number")
        if key != _PORT and not isinstance(name, str):
            # YAML does not read NO, on and 5 as strings.
            raise TemplateError(f"{where}.{key}: must be a string (put it in quotes)")
        result[name] = merge(result.get(name), item, where)
    return list(result.values())


def _appended(base: list[Any], patch: list[Any]) -> list[Any]:
    return [*base, *(copy.deepcopy(item) for item in patch if item not in base)]


def _check_strings(metadata: Mapping[str, Any]) -> None:
    for part in _OWN_METADATA:
        for key, value in (metadata.get(part) or {}).items():
            if not isinstance(value, str):
                raise TemplateError(f"metadata.{part}.{key}: must be a string (put it in quotes)")
