"""Rendering of a pool's batch script from its spec and the policy's grant. Without side effects."""

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from isthmus_contracts import identities as names
from isthmus_contracts.pb import bridge_pb2 as pb

from ..clients_per_job import per_job
from ..files.run_directory import AUDIT_FOLDER
from ..policy.authorization import Grant
from ..policy.policy import Environment
from ..slurm.model import Gres
from .setup_lines import steps

# A task's attempt number is this times the pool's attempt, plus Slurm's restart count.
RESTARTS_PER_ATTEMPT = 1000
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Shell(str):
    """Text that is safe to insert into the script."""

    __slots__ = ()


@dataclass(frozen=True)
class Variable:
    """A part of an argument that the script fills in when it runs."""

    name: str


Argument = str | tuple[str | Variable, ...]


def quote(argument: Argument) -> Shell:
    """Quote a value for the script, so that bash reads exactly this argument. Raises ``ValueError`` for NUL."""
    if isinstance(argument, str):
        if "\0" in argument:
            raise ValueError("a NUL character cannot be an argument")
        return Shell(shlex.quote(argument))
    parts = (f'"${{{part.name}}}"' if isinstance(part, Variable) else quote(part) for part in argument)
    return Shell("".join(parts))


def render(key: str, spec: pb.PoolSpec, grant: Grant, run_dir: Path, tls_dir: Path) -> str:
    """Return the script of one client: the pool's batch script, or its client script if clients share a job.

    ``run_dir``: the pool's own directory.
    """
    environment = grant.environment
    prefix = _prefix(environment, grant, tls_dir)
    job_env = sorted(spec.env.items())
    carried = _carried(job_env) if prefix else []
    return _TEMPLATE.render(
        title=_title(key, spec),
        per_job=per_job(spec),
        run_dir=str(run_dir),
        modules=environment.modules,
        venv=str(environment.venv) if environment.venv else "",
        site_env=sorted(environment.env.items()),
        setup=steps(tuple(environment.setup)),
        prefix=prefix,
        job_env=job_env,
        carried=carried,
        unpack=_unpacking([name for name, _ in carried]),
        federation_env=list(_federation(spec, grant, tls_dir).items()),
        audit_folder=AUDIT_FOLDER,
        audit_name=names.ENV_AUDIT_DIR,
        audit_dir=_audit_dir(environment),
        index_name=names.ENV_INDEX,
        client_name=names.ENV_CLIENT,
        first_index=spec.first_index,
        first_client=spec.first_client,
        attempt_name=names.ENV_ATTEMPT,
        step_name=names.ENV_STEP,
        attempt_base=spec.attempt * RESTARTS_PER_ATTEMPT,
        command=list(spec.command),
    )


def render_job(key: str, spec: pb.PoolSpec, gres: Iterable[Gres], client_script: Path) -> str:
    """Return the batch script of a pool whose jobs hold several clients: it starts the client script."""
    return _JOB_TEMPLATE.render(
        title=_title(key, spec),
        replicas=spec.replicas,
        per_job=per_job(spec),
        cpus=spec.cpus_per_task,
        gpus=",".join(":".join(filter(None, (g.type, str(g.count)))) for g in gres if g.name == "gpu"),
        client_script=str(client_script),
    )


def _carried(variables: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Give variables neutral names, with a prefix that users cannot use, under which a launcher passes them on."""
    return [
        (f"{names.RESERVED_ENV_PREFIX}ENV_{number}", f"{name}={value}")
        for number, (name, value) in enumerate(variables)
    ]


def _unpacking(carried: Iterable[str]) -> str:
    """Return the POSIX shell program that restores carried variables and then executes the job's command."""
    # With `command`, a read-only variable of the shell (UID) does not end the program.
    parts = [f'command export "${name}" 2>/dev/null; unset {name}' for name in carried]
    return "; ".join([*parts, 'exec "$@"'])


def _title(key: str, spec: pb.PoolSpec) -> str:
    return f"{spec.namespace}/{spec.job}, pool {spec.pool}, key {key}"


def comment(spec: pb.PoolSpec, caller: str) -> str:
    """Return the job's comment in the queue: its FederatedJob and its caller. At most 255 characters."""
    whose = re.sub(r"[^A-Za-z0-9./-]", "_", f"{spec.namespace}/{spec.job}/{spec.pool}")[:200]
    return f"isthmus {whose} for {re.sub(r'[^A-Za-z0-9./-]', '_', caller.removeprefix('isthmus://'))}"[:255]


def _federation(spec: pb.PoolSpec, grant: Grant, tls_dir: Path) -> Mapping[str, str]:
    inside = grant.environment.inside
    env = {
        names.ENV_ENDPOINT: grant.endpoint,
        names.ENV_SERVER_NAME: spec.federation.server_name,
        names.ENV_TLS_DIR: str(inside.tls_dir or tls_dir),
        names.ENV_JOB_UID: spec.job_uid,
        names.ENV_JOB: f"{spec.namespace}/{spec.job}",
        names.ENV_POOL: spec.pool,
        names.ENV_POOL_SIZE: str(spec.pool_size or spec.replicas),
        names.ENV_CLIENTS: str(spec.total_clients),
    }
    if grant.data:
        env[names.ENV_DATA] = str(inside.data or grant.data)
    return env


def _audit_dir(environment: Environment) -> Argument:
    """Return the folder of the client's audit file, as the script in the container sees it."""
    inside = environment.inside.work_dir
    return str(inside / AUDIT_FOLDER) if inside else (Variable("work_dir"), f"/{AUDIT_FOLDER}")


def _prefix(environment: Environment, grant: Grant, tls_dir: Path) -> list[Argument]:
    work = Variable("work_dir")
    if environment.apptainer:
        built: list[Argument] = ["apptainer", "exec", "--bind", f"{tls_dir}:{tls_dir}:ro"]
        built += ["--bind", (work, ":", work), "--pwd", (work,)]
        if grant.data:
            built += ["--bind", f"{grant.data}:{grant.data}:ro"]
        return [*built, *environment.options, str(environment.apptainer)]
    values: dict[str, str | Variable] = {
        "tls_dir": str(tls_dir), "work_dir": work, "data": grant.data, "image": grant.image,
    }  # fmt: skip
    return [_filled(argument, values) for argument in environment.prefix if grant.data or "{data}" not in argument]


def _filled(argument: str, values: Mapping[str, str | Variable]) -> Argument:
    parts: list[str | Variable] = []
    # With one group, split() alternates literal text and placeholders.
    for number, part in enumerate(_PLACEHOLDER.split(argument)):
        if number % 2:
            parts.append(values[part])
        elif part:
            parts.append(part)
    return tuple(parts)


def _variable_name(text: str) -> Shell:
    if _NAME.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a name of a variable")
    return Shell(text)


def _comment(text: str) -> Shell:
    return Shell(re.sub(r"[^A-Za-z0-9 ,./-]", "_", text))


def _only_safe(value: Any) -> str:
    # Jinja passes every {{ }} through this function: an unfiltered value stops the rendering.
    if isinstance(value, Shell):
        return value
    if type(value) is int:
        return str(value)
    raise TypeError(f"unquoted value in the batch script's template: {value!r}")


def _environment(filters: Iterable[tuple[str, Any]]) -> jinja2.Environment:
    # Autoescape is for HTML; `finalize` is the stricter check that a shell script needs.
    environment = jinja2.Environment(  # noqa: S701
        loader=jinja2.PackageLoader("isthmus_bridge", "templates"),
        undefined=jinja2.StrictUndefined,
        finalize=_only_safe,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters)
    return environment


_TEMPLATES = _environment([("sh", quote), ("name", _variable_name), ("comment", _comment), ("verbatim", Shell)])
_TEMPLATE = _TEMPLATES.get_template("batch.sh.j2")
_JOB_TEMPLATE = _TEMPLATES.get_template("job.sh.j2")
