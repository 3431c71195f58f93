"""``isthmus submit``: creates a FederatedJob from a script on this machine, without building an image."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from isthmus_contracts.identities import API_VERSION
from isthmus_contracts.manifests.code_files import check_files
from isthmus_contracts.manifests.manifest import ManifestError, check_job_name, parse_federated_job
from isthmus_contracts.manifests.yaml_output import dumped

_POOL = re.compile(
    r"(?P<name>[a-z][a-z0-9-]*)=(?P<replicas>\d+)(?:@(?P<site>[a-z][a-z0-9-]*)(?:/(?P<environment>[a-z][a-z0-9-]*))?)?"
)


def documents(
    script: Path,
    files: Sequence[Path],
    arguments: Sequence[str],
    *,
    name: str | None,
    image: str,
    rounds: int,
    pools: Sequence[str],
    algorithm: str,
    config: Sequence[str],
    template: Path | None,
) -> list[dict[str, Any]]:
    """Return the ConfigMap with the script and its files, and the FederatedJob that runs it.

    ``template``: a FederatedJob manifest whose spec provides all other settings.
    Raises :class:`ManifestError`, which names the flag or the field.
    """
    name = name or re.sub(r"[^a-z0-9]+", "-", script.stem.lower()).strip("-")
    if problems := check_job_name(name):
        raise ManifestError([f"{problems[0]}; choose one with --name"])
    content = _content([script, *files])
    spec: dict[str, Any] = _template(template) if template is not None else {}
    task = dict(spec.get("task") or {})
    task |= {"image": image or task.get("image"), "command": ["python", script.name, *arguments]}
    task["code"] = {"configMapRef": {"name": f"{name}-files"}}
    if task["image"] is None:
        raise ManifestError(
            ["--image: is missing; it names the image with Python, PyTorch and isthmus that runs the script"]
        )
    if config:
        task["config"] = {**(task.get("config") or {}), **dict(_setting(item) for item in config)}
    spec["task"] = task
    if rounds or "rounds" not in spec:
        spec["rounds"] = rounds or 10
    if algorithm:
        spec["strategy"] = {"algorithm": algorithm}
    if pools or "pools" not in spec:
        spec["pools"] = [_pool(text) for text in pools or ["cloud=2"]]
    job = {"apiVersion": API_VERSION, "kind": "FederatedJob", "metadata": {"name": name}, "spec": spec}
    parse_federated_job(job)
    code = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{name}-files"}, "data": content}
    return [code, job]


def dump(objects: Sequence[dict[str, Any]]) -> str:
    """Format objects as YAML for ``kubectl apply`` and ``isthmus run``."""
    return dumped(objects)


def next_step(script: Path, name: str) -> str:
    """Return the message that tells the user how to follow the job."""
    return f"submitted {script} as FederatedJob {name}; follow it with: {shlex.join(['isthmus', 'status', name])}"


def _content(paths: Sequence[Path]) -> dict[str, str]:
    content: dict[str, str] = {}
    for path in paths:
        if path.name in content:
            raise ManifestError([f"{path}: another file has the same name; all files are copied into one directory"])
        try:
            content[path.name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ManifestError(
                [f"{path}: is not UTF-8 text; data belongs in a volume or the site's data sets"]
            ) from None
        except OSError as error:
            raise ManifestError([f"{path}: {error.strerror or error}"]) from None
    if problem := check_files({file: text.encode() for file, text in content.items()}):
        raise ManifestError([f"the files: {problem}"])
    return content


def _template(path: Path) -> dict[str, Any]:
    try:
        found = [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if isinstance(item, dict)]
    except OSError as error:
        raise ManifestError([f"{path}: {error.strerror or error}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ManifestError([f"{path}: not valid YAML: {' '.join(str(error).split())}"]) from None
    jobs = [item for item in found if item.get("kind") == "FederatedJob" and isinstance(item.get("spec"), dict)]
    if len(jobs) != 1:
        raise ManifestError([f"{path}: holds {len(jobs)} FederatedJobs instead of one"])
    return dict(jobs[0]["spec"])


def _pool(text: str) -> dict[str, Any]:
    match = _POOL.fullmatch(text)
    if match is None:
        raise ManifestError([f"--pool: {text!r} is not NAME=CLIENTS or NAME=CLIENTS@SITE/ENVIRONMENT"])
    pool: dict[str, Any] = {"name": match["name"], "replicas": int(match["replicas"])}
    if match["site"] is None:
        return {**pool, "cloud": {}}
    if match["environment"] is None:
        raise ManifestError([f"--pool: {text!r} lacks the site's environment: {text}/ENVIRONMENT; see isthmus sites"])
    return {**pool, "hpc": {"siteRef": {"name": match["site"]}, "environment": match["environment"]}}


def _setting(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise ManifestError([f"--config: {text!r} is not NAME=VALUE"])
    return name, value
