"""The file with the admin's job defaults, which is validated before any job uses them."""

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from isthmus_contracts.manifests.manifest import one_liners, parse_spec

from ..state.observed import Job
from . import aggregator, client
from .defaults import JobDefaults, PodDefaults
from .merge import TemplateError
from .pod import refuse_reserved
from .restrict import violations

# Fields of a container that belong to the manifest.
_OF_THE_MANIFEST = ("name", "image", "command", "args", "workingDir")


_NEVER = dt.datetime.min.replace(tzinfo=dt.UTC)


class DefaultsError(ValueError):
    """The defaults are invalid. ``str()`` names the field."""


def load(path: Path, allowed: frozenset[str]) -> JobDefaults:
    """Read the defaults from a YAML file. Raises :class:`DefaultsError`.

    ``allowed``: exceptions for pod templates, see :mod:`.restrict`; they apply to the defaults as well.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DefaultsError(f"cannot be read: {' '.join(str(error).split())}") from None
    try:
        given = JobDefaults.model_validate({} if content is None else content)
    except ValidationError as error:
        raise DefaultsError("; ".join(one_liners(error, "jobDefaults"))) from None
    problems = list(_problems(given, allowed))
    if problems:
        raise DefaultsError("; ".join(problems))
    return given


def _problems(given: JobDefaults, allowed: frozenset[str]) -> Iterator[str]:
    for name, part in (("all", given.all), ("aggregator", given.aggregator), ("clients", given.clients)):
        yield from (
            f"jobDefaults.{name}.container.{field}: belongs to the manifest, not to the defaults"
            for field in _OF_THE_MANIFEST
            if field in part.container
        )
        try:
            refuse_reserved({"spec": {**part.spec, "containers": [part.container]}})
            refuse_reserved({"spec": part.spec})
            _refuse_own_containers(part)
            for pod in _pods(JobDefaults(**{name: part})):
                yield from (f"jobDefaults.{name}: {problem}" for problem in violations(pod, allowed))
        except TemplateError as error:
            yield f"jobDefaults.{name}.{error}"


def _refuse_own_containers(part: PodDefaults) -> None:
    for number, item in enumerate(part.spec.get("containers") or ()):
        if isinstance(item, dict) and item.get("name") in (aggregator.CONTAINER, client.CONTAINER):
            raise TemplateError(f"spec.containers[{number}].name: {item['name']!r} is set by `container`")


def _pods(given: JobDefaults) -> tuple[dict[str, Any], dict[str, Any]]:
    """Render the pods of a minimal job with these defaults."""
    pools = [{"name": "pool", "cloud": {}}]
    spec = parse_spec({"rounds": 1, "task": {"image": "none", "command": ["none"]}, "pools": pools})
    job = Job("job", "namespace", "00000000-0000-0000-0000-000000000000", 1, _NEVER, {})
    one = client.ClientPods(job, spec, spec.pools[0], "", (), given).pod(0, 0)
    return aggregator.pod(job, spec, "", (), given), one
