"""Checks of the form of requests, and comparison of specs. Pure functions."""

import hashlib
import json
import math
import re
from collections.abc import Iterator

from isthmus_contracts.api.fields import (
    PATTERN_DNS_LABEL,
    PATTERN_ENV_NAME,
    PATTERN_HOST_PORT,
    PATTERN_IMAGE,
    PATTERN_SLURM_ACCOUNT,
    PATTERN_SLURM_NAME,
)
from isthmus_contracts.identities import RESERVED_ENV_PREFIX
from isthmus_contracts.manifests.code_files import check_files
from isthmus_contracts.pb import bridge_pb2 as pb

from ..files.run_directory import PATTERN_KEY

# Kubernetes allows a namespace to begin with a digit, and dots in an object's name.
_PATTERN_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
_PATTERN_UID = r"^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?$"
_PATTERN_SERVER_NAME = r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$"

MAX_ARGUMENTS = 128
MAX_VARIABLES = 128
MAX_TEXT = 4096
# Of command and variables together, in bytes: Slurm takes scripts of at most 4 MiB, and quoting may need five times
# the space.
MAX_TOTAL = 256 * 1024
MAX_CERTIFICATE = 64 * 1024


class RequestError(ValueError):
    """A field is malformed. ``str()`` is one line that names it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")


def check_key(key: str) -> None:
    """Raise :class:`RequestError` if the key is malformed."""
    _match("key", key, PATTERN_KEY, 63)


def check_spec(spec: pb.PoolSpec) -> None:
    """Raise :class:`RequestError` for the first malformed field."""
    _match("spec.job_uid", spec.job_uid, _PATTERN_UID, 64)
    _match("spec.namespace", spec.namespace, _PATTERN_NAME, 63)
    _match("spec.job", spec.job, _PATTERN_NAME, 253)
    _match("spec.pool", spec.pool, PATTERN_DNS_LABEL, 63)
    _between("spec.attempt", spec.attempt, 0, 2_000_000)
    _between("spec.replicas", spec.replicas, 1, 1_000_000)
    _between("spec.total_clients", spec.total_clients, 1, 10_000_000)
    _between("spec.clients_per_job", spec.clients_per_job, 0, 1024)
    _between("spec.first_index", spec.first_index, 0, 1_000_000)
    _between("spec.pool_size", spec.pool_size, 0, 1_000_000)
    if spec.first_client + spec.replicas > spec.total_clients:
        raise RequestError(
            "spec.first_client",
            f"{spec.first_client} + {spec.replicas} replicas is more than total_clients, {spec.total_clients}",
        )
    for name in ("partition", "account", "qos"):
        if value := getattr(spec, name):
            _match(f"spec.{name}", value, PATTERN_SLURM_ACCOUNT if name == "account" else PATTERN_SLURM_NAME, 64)
    _between("spec.time_limit_seconds", spec.time_limit_seconds, 60, 365 * 86400)
    _between("spec.max_queue_seconds", spec.max_queue_seconds, 0, 365 * 86400)
    _between("spec.cpus_per_task", spec.cpus_per_task, 1, 1_000_000)
    _between("spec.memory_mib", spec.memory_mib, 1, 1 << 30)
    _check_gres(spec)
    _match("spec.environment", spec.environment, PATTERN_DNS_LABEL, 63)
    if spec.data_ref:
        _match("spec.data_ref", spec.data_ref, PATTERN_DNS_LABEL, 63)
    if spec.image:
        _match("spec.image", spec.image, PATTERN_IMAGE, 512)
        if ".." in spec.image.split("/"):
            # A prefix may use it as a path, which must not escape the policy's patterns.
            raise RequestError("spec.image", f"{spec.image!r} holds a parent directory")
    _check_script(spec)
    if spec.code and (problem := check_files(spec.code)):
        raise RequestError("spec.code", problem)
    _check_federation(spec.federation)
    # The clients' trust file takes both. 0: the job does not say.
    _between("spec.privacy.min_parties", spec.privacy.min_parties, 0, 1000)
    _between("spec.privacy.min_clients", spec.privacy.min_clients, 0, 1_000_000)
    for name in ("clip_norm", "noise_multiplier", "delta", "max_epsilon"):
        # Also refuses NaN.
        if not 0 <= (value := getattr(spec.privacy, name)) < math.inf:
            raise RequestError(f"spec.privacy.{name}", f"must be 0 or more and finite, not {value}")


def digest(spec: pb.PoolSpec) -> str:
    """Return a digest of the spec without its credentials. It covers values, not bytes, which depend on protobuf."""
    return hashlib.sha256(json.dumps(_values(spec), sort_keys=True).encode()).hexdigest()


def differences(old: pb.PoolSpec, new: pb.PoolSpec) -> list[str]:
    """Return the names of the fields in which two specs differ, without credentials."""
    before, after = _values(old), _values(new)
    return [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def _values(spec: pb.PoolSpec) -> dict[str, object]:
    values: dict[str, object] = {field.name: getattr(spec, field.name) for field in spec.DESCRIPTOR.fields}
    values["gres"] = [[gres.name, gres.type, gres.count] for gres in spec.gres]
    values["command"] = list(spec.command)
    values["env"] = dict(spec.env)
    values["code"] = {name: hashlib.sha256(content).hexdigest() for name, content in spec.code.items()}
    federation: list[object] = [spec.federation.endpoint, spec.federation.server_name]
    values["federation"] = [*federation, True] if spec.federation.via_bridge else federation
    privacy = spec.privacy
    stated = {field.name: getattr(privacy, field.name) for field in privacy.DESCRIPTOR.fields}
    values["privacy"] = {name: value for name, value in stated.items() if value}
    # Without unset fields, so that a field added by a later version does not change the digest until it is used.
    return {name: value for name, value in values.items() if value}


def _check_gres(spec: pb.PoolSpec) -> None:
    if len(spec.gres) > 16:
        raise RequestError("spec.gres", "holds more than 16 entries")
    for number, gres in enumerate(spec.gres):
        _match(f"spec.gres[{number}].name", gres.name, PATTERN_SLURM_NAME, 64)
        if gres.type:
            _match(f"spec.gres[{number}].type", gres.type, PATTERN_SLURM_NAME, 64)
        _between(f"spec.gres[{number}].count", gres.count, 1, 4096)


def _check_script(spec: pb.PoolSpec) -> None:
    if not 1 <= len(spec.command) <= MAX_ARGUMENTS:
        raise RequestError("spec.command", f"must hold 1 to {MAX_ARGUMENTS} arguments, not {len(spec.command)}")
    if not spec.command[0]:
        raise RequestError("spec.command[0]", "is empty")
    if len(spec.env) > MAX_VARIABLES:
        raise RequestError("spec.env", f"holds more than {MAX_VARIABLES} variables")
    for name, value in spec.env.items():
        _match("spec.env", name, PATTERN_ENV_NAME, 128)
        if name.startswith(RESERVED_ENV_PREFIX):
            raise RequestError(f"spec.env[{name}]", f"names that begin with {RESERVED_ENV_PREFIX} are reserved")
        _text(f"spec.env[{name}]", value)
    for number, argument in enumerate(spec.command):
        _text(f"spec.command[{number}]", argument)
    total = sum(len(text.encode()) for text in _texts(spec))
    if total > MAX_TOTAL:
        raise RequestError("spec", f"command and env hold {total} bytes; at most {MAX_TOTAL} are taken")


def _texts(spec: pb.PoolSpec) -> Iterator[str]:
    yield from spec.command
    for name, value in spec.env.items():
        yield name
        yield value


def _check_federation(federation: pb.Federation) -> None:
    _match("spec.federation.endpoint", federation.endpoint, PATTERN_HOST_PORT, 260)
    if not 1 <= int(federation.endpoint.rpartition(":")[2]) <= 65535:
        raise RequestError("spec.federation.endpoint", f"{federation.endpoint!r} has no valid port")
    _match("spec.federation.server_name", federation.server_name, _PATTERN_SERVER_NAME, 253)
    check_credentials(federation, "spec.federation.")


def check_credentials(holder: pb.Federation | pb.RenewCredentialsRequest, path: str = "") -> None:
    """Raise :class:`RequestError` unless the credentials are PEM. ``path``: prefix of the field names in errors."""
    for name in ("ca_certificate", "certificate", "private_key"):
        content: bytes = getattr(holder, name)
        # Never quote the content: it may be a key.
        if not content.lstrip().startswith(b"-----BEGIN ") or b"\0" in content:
            raise RequestError(f"{path}{name}", "is not PEM")
        if len(content) > MAX_CERTIFICATE:
            raise RequestError(f"{path}{name}", f"is longer than {MAX_CERTIFICATE} bytes")


def _match(field: str, value: str, pattern: str, longest: int) -> None:
    if not value:
        raise RequestError(field, "is missing")
    if len(value) > longest:
        raise RequestError(field, f"is longer than {longest} characters")
    # `$` would let a trailing newline pass.
    if re.fullmatch(pattern, value) is None or "\n" in value:
        raise RequestError(field, f"{value[:80]!r} does not match {pattern}")


def _between(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RequestError(field, f"must be between {low} and {high}, not {value}")


def _text(field: str, value: str) -> None:
    # Newlines are allowed (`python -c` takes programs): quoting preserves them.
    if "\0" in value:
        raise RequestError(field, "holds a NUL character")
    if len(value) > MAX_TEXT:
        raise RequestError(field, f"is longer than {MAX_TEXT} characters")
