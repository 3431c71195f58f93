"""Parser of FederatedJob manifests, used by both the operator and ``isthmus run``."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from ..api.federated_job import FederatedJobSpec
from ..api.fields import (
    PATTERN_CLASS,
    PATTERN_DECIMAL,
    PATTERN_DNS_LABEL,
    PATTERN_ENV_NAME,
    PATTERN_NAMESPACE,
    PATTERN_OBJECT_NAME,
    PATTERN_SIGNING_ROOT,
    PATTERN_STORAGE_CLASS,
)
from ..api.hpc_site import HpcSiteSpec
from ..identities import API_VERSION
from .code_files import check_files

# The aggregator's Service is named <job>-aggregator and must fit a DNS label.
MAX_JOB_NAME = 50
KIND = "FederatedJob"

_PLAIN_PATTERNS = {
    PATTERN_CLASS: "of the form module:Class",
    PATTERN_DECIMAL: "a decimal number, in quotes",
    PATTERN_DNS_LABEL: "lower-case letters, digits and hyphens, beginning with a letter",
    PATTERN_NAMESPACE: "lower-case letters, digits and hyphens",
    PATTERN_OBJECT_NAME: "lower-case letters, digits, hyphens and dots",
    PATTERN_SIGNING_ROOT: "a public key: 64 hexadecimal digits in lower case",
    PATTERN_STORAGE_CLASS: "lower-case letters, digits, hyphens and dots",
    PATTERN_ENV_NAME: "letters, digits and underscores, not beginning with a digit",
}

_PLAIN_TYPES = {
    "string_type": "a string (put it in quotes)",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "a mapping",
    "list_type": "a list",
    "model_type": "a mapping",
}


class ManifestError(ValueError):
    """An invalid manifest. ``str()`` is one line that names every wrong field."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class FederatedJob:
    """A valid manifest: its name, its namespace and its typed spec."""

    name: str
    namespace: str
    spec: FederatedJobSpec


def parse_federated_job(manifest: Any) -> FederatedJob:
    """Validate a FederatedJob object. Raises :class:`ManifestError`."""
    if not isinstance(manifest, Mapping):
        raise ManifestError([f"a manifest is a mapping, not {_shown(manifest)}"])
    problems = []
    if manifest.get("apiVersion") != API_VERSION:
        problems.append(f"apiVersion: must be {API_VERSION}, not {_shown(manifest.get('apiVersion'))}")
    if manifest.get("kind") != KIND:
        problems.append(f"kind: must be {KIND}, not {_shown(manifest.get('kind'))}")
    metadata = manifest.get("metadata")
    name, namespace = "", "default"
    if not isinstance(metadata, Mapping) or not isinstance(metadata.get("name"), str):
        problems.append("metadata.name: is missing")
    else:
        name, namespace = metadata["name"], metadata.get("namespace") or "default"
        problems += check_job_name(name)
    unknown = sorted(str(key) for key in manifest if key not in ("apiVersion", "kind", "metadata", "spec", "status"))
    problems += [f"{key}: unknown field" for key in unknown]
    spec = None
    if "spec" not in manifest:
        problems.append("spec: is missing")
    else:
        problems += _empty_protection(manifest["spec"])
        try:
            spec = parse_spec(manifest["spec"])
        except ManifestError as error:
            problems += error.problems
    if problems or spec is None:
        raise ManifestError(problems)
    return FederatedJob(name, namespace, spec)


def _empty_protection(spec: Any) -> list[str]:
    """Return the fields of ``privacy`` without a value: the job would run unprotected."""
    privacy = spec.get("privacy") if isinstance(spec, Mapping) else None
    if not isinstance(privacy, Mapping):
        return []
    ways = {"secureAggregation": "write {} to switch it on", "differentialPrivacy": "give its settings"}
    return [
        f"spec.privacy.{name}: is empty; {way}, or leave the field out"
        for name, way in ways.items()
        if name in privacy and privacy[name] is None
    ]


def check_job_name(name: str) -> list[str]:
    """Return the problem with a job's name, after which its pods and its Service are named."""

    if not re.fullmatch(PATTERN_DNS_LABEL, name):
        return [f"metadata.name: {name!r} is not {_PLAIN_PATTERNS[PATTERN_DNS_LABEL]}"]
    if len(name) > MAX_JOB_NAME:
        return [f"metadata.name: {len(name)} characters are too many; the Service's name leaves {MAX_JOB_NAME}"]
    return []


def parse_spec(spec: Any) -> FederatedJobSpec:
    """Validate a FederatedJob's spec. Raises :class:`ManifestError`."""
    try:
        return FederatedJobSpec.model_validate(spec, by_alias=True, by_name=False)
    except ValidationError as error:
        raise ManifestError(one_liners(error)) from None


def parse_site_spec(spec: Any) -> HpcSiteSpec:
    """Validate an HPCSite's spec. Raises :class:`ManifestError`."""
    try:
        return HpcSiteSpec.model_validate(spec, by_alias=True, by_name=False)
    except ValidationError as error:
        raise ManifestError(one_liners(error)) from None


def load_federated_job(path: Path) -> FederatedJob:
    """Read the only FederatedJob of a YAML file; other documents are skipped. Raises :class:`ManifestError`."""
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ManifestError([f"{path}: {error.strerror or error}"]) from None
    except UnicodeDecodeError:
        raise ManifestError([f"{path}: is not UTF-8 text"]) from None
    except yaml.YAMLError as error:
        raise ManifestError([f"{path}: not valid YAML: {' '.join(str(error).split())}"]) from None
    jobs = [document for document in documents if isinstance(document, Mapping) and document.get("kind") == KIND]
    if len(jobs) != 1:
        found = "no FederatedJob" if not jobs else f"{len(jobs)} FederatedJobs"
        raise ManifestError([f"{path}: holds {found}; one is needed"])
    return parse_federated_job(jobs[0])


def load_code(path: Path, job: FederatedJob) -> dict[str, bytes]:
    """Return the files of a job's ``task.code``, from the ConfigMap in the same YAML file.

    Raises :class:`ManifestError`.
    """
    if job.spec.task.code is None:
        return {}
    name = job.spec.task.code.config_map_ref.name
    field = "spec.task.code.configMapRef.name"
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        if not isinstance(document, Mapping) or document.get("kind") != "ConfigMap":
            continue
        if (document.get("metadata") or {}).get("name") == name:
            files = {str(key): str(text).encode() for key, text in (document.get("data") or {}).items()}
            if problem := check_files(files):
                raise ManifestError([f"{field}: ConfigMap {name!r}: {problem}"])
            return files
    raise ManifestError([f"{field}: without a cluster, the ConfigMap {name!r} must be in {path} as well"])


def one_liners(error: ValidationError, root: str = "spec") -> list[str]:
    """Return pydantic's errors, each as ``path: problem, and how to fix it``; paths begin with ``root``."""
    return [_one_liner(dict(item), root) for item in error.errors(include_url=False)]


def _one_liner(item: dict[str, Any], root: str) -> str:
    path = root
    for part in item["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    kind, context, value = item["type"], item.get("ctx", {}), _shown(item.get("input"))
    if kind == "value_error":
        message = str(context["error"])
        # The message of a check on several fields starts with a path below the model.
        joined = message.split(":", 1)[0]
        is_path = ":" in message and " " not in joined
        return f"{path}.{message}" if is_path else f"{path}: {message}"
    if kind == "missing":
        return f"{path}: is missing"
    if kind == "extra_forbidden":
        name = path.rpartition(".")[2]
        hint = f"; names are in camelCase: {to_camel(name)}" if "_" in name.strip("_") else ""
        return f"{path}: unknown field{hint}"
    if kind == "literal_error":
        return f"{path}: must be one of {context['expected'].replace(' or ', ', ').replace(chr(39), '')}, not {value}"
    if kind == "string_pattern_mismatch":
        pattern = context["pattern"]
        plain = _PLAIN_PATTERNS.get(pattern)
        return f"{path}: {value} is not {plain}" if plain else f"{path}: {value} does not match {pattern}"
    if kind == "greater_than_equal":
        return f"{path}: must be at least {context['ge']}, not {value}"
    if kind == "less_than_equal":
        return f"{path}: must be at most {context['le']}, not {value}"
    if kind == "too_short":
        return f"{path}: needs at least {context['min_length']} item(s)"
    if wanted := _PLAIN_TYPES.get(kind):
        return f"{path}: must be {wanted}, not {value}"
    return f"{path}: {item['msg']}, not {value}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
