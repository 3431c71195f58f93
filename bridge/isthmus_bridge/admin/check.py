"""The `check` command: an explanation of a policy, and the problems that it would have on this machine."""

import datetime as dt
import os
from collections.abc import Iterator
from pathlib import Path

from isthmus_contracts.wire.pki import Credentials, expiry

from ..policy.authorization import (
    accounts_of,
    data_sets_of,
    draining,
    environments_of,
    limits_of,
    options_of,
    partitions_of,
    qos_of,
    takes_code,
)
from ..policy.policy import Environment, Identity, Policy
from ..slurm.cli import OWN_ARGUMENTS, arguments
from ..slurm.model import SlurmError, Submission
from ..slurm.unix_users import uid_of
from ..slurm_adapters import slurm_adapter
from ..users.sudoers import run_dir
from ..users.user_checks import faults
from . import privacy
from .strict_modes import readable_by_others

_SOON = dt.timedelta(days=30)


def explain(policy: Policy, uri: str | None = None) -> Iterator[str]:
    """Yield lines that say what each identity, or the given one, may do."""
    yield f"site {policy.site}"
    yield from privacy.explain(policy)
    chosen = [identity for identity in policy.identities if uri in (None, identity.uri)]
    if not chosen:
        known = ", ".join(identity.uri for identity in policy.identities)
        yield f"{uri} may do nothing: it is not among the identities ({known})"
    for identity in chosen:
        yield from _identity(policy, identity)


def _identity(policy: Policy, identity: Identity) -> Iterator[str]:
    limits = limits_of(policy, identity)
    partitions, accounts = partitions_of(policy, identity), accounts_of(policy, identity)
    yield f"{identity.uri} may submit"
    if denial := draining(policy, identity):
        yield f"  nothing for now ({denial}); otherwise"
    yield f"  as {_owner(policy, identity)}"
    yield f"  for jobs of the namespaces: {', '.join(identity.namespaces)}"
    yield f"  to the partitions: {_listed(partitions)} (default: {next(iter(partitions), 'of Slurm')})"
    yield f"  to the accounts: {_listed(accounts)} (default: {next(iter(accounts), 'of Slurm')})"
    yield f"  with QOS: {_listed(qos_of(policy, identity))}"
    yield "  in the environments:"
    for name in sorted(environments_of(policy, identity)):
        yield f"    {name}: {_environment(policy.environments[name])}"
    data_sets = [f"{name} ({policy.data_sets[name]})" for name in sorted(data_sets_of(policy, identity))]
    yield f"  with the data sets: {_listed(data_sets)}"
    yield f"  {'with' if takes_code(policy, identity) else 'without'} files of their own (task.code)"
    gres = ", ".join(f"{name}:{count}" for name, count in sorted(limits.gres.items()))
    yield (
        f"  at most {limits.replicas} clients a pool and {limits.pools} pools at a time; each job at most"
        f" {limits.cpus_per_task} CPUs, {limits.memory_mib} MiB, {limits.time_limit_seconds} s,"
        f" generic resources: {gres or 'none'}"
    )
    yield from _command_lines(policy, identity)


def _command_lines(policy: Policy, identity: Identity) -> Iterator[str]:
    """Yield sbatch's options for a request that names only an environment, if the site adds any options."""
    if not policy.option_places():
        return
    yield "  for one client of 1 CPU and 1024 MiB, sbatch is run with"
    for name in sorted(environments_of(policy, identity)):
        for partition in partitions_of(policy, identity) or [""]:
            options, qos = options_of(policy, identity, partition, policy.environments[name])
            account = next(iter(accounts_of(policy, identity)), "")
            example = Submission(
                name="", script=Path(), directory=Path(), output="", tasks=1, comment="", partition=partition,
                account=account, qos=qos, time_limit_seconds=3600, warning_seconds=60, cpus_per_task=1,
                memory_mib=1024, options=options,
            )  # fmt: skip
            own = (argument for argument in arguments(example)[:-1] if argument.startswith(OWN_ARGUMENTS))
            yield f"    {name}: {' '.join(own)}"


def _owner(policy: Policy, identity: Identity) -> str:
    if identity.user is None:
        return "the user who runs the bridge"
    uid = uid_of(identity.user)
    number = "not known here" if uid is None else f"uid {uid}"
    return f"the local user {identity.user} ({number}), with its files in {run_dir(policy, identity.user)}"


def _environment(environment: Environment) -> str:
    if environment.apptainer:
        kind = f"Apptainer image {environment.apptainer}"
    elif environment.prefix:
        kind = f"command prefix {' '.join(environment.prefix)}"
        if environment.images:
            kind += f", images {', '.join(environment.images)}"
    elif environment.modules:
        kind = f"modules {' '.join(environment.modules)}"
        if environment.venv:
            kind += f", venv {environment.venv}"
    else:
        kind = f"venv {environment.venv}"
    return kind + (f", {len(environment.setup)} set-up lines" if environment.setup else "")


def problems(policy: Policy) -> Iterator[str]:
    """Yield the problems of the policy on this machine, one line each."""
    yield from _directory(policy)
    yield from faults(policy)
    yield from _tls(policy.tls_dir)
    yield from privacy.problems(policy)
    for number, gateway in enumerate(policy.gateways):
        if gateway.ca is not None:
            yield from _lacking(f"gateways[{number}].ca", gateway.ca)
    for name, environment in sorted(policy.environments.items()):
        for path in (environment.venv, environment.apptainer):
            if path is not None:
                yield from _lacking(f"environments.{name}", path)
    for name, path in sorted(policy.data_sets.items()):
        yield from _lacking(f"data_sets.{name}", path)
    try:
        slurm_adapter(policy).jobs()
    except SlurmError as error:
        yield f"slurm: {error}"


def _lacking(field: str, path: Path) -> Iterator[str]:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        yield f"{field}: {path} does not exist on this machine"
    except OSError as error:
        yield f"{field}: {path} is not accessible to this user: {error.strerror}"


def readable(policy: Policy, file: Path) -> Iterator[str]:
    """Yield a problem if local users can read the policy file."""
    if policy.users is not None and readable_by_others(file):
        yield f"policy: other users can read {file} and so the site's rules; chgrp it to the bridge's group, chmod 640"


def _directory(policy: Policy) -> Iterator[str]:
    path = policy.run_dir
    try:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
    except OSError as error:
        yield f"run_dir: {path} is not accessible to this user: {error.strerror}"
        return
    if not os.access(existing, os.W_OK | os.X_OK):
        yield f"run_dir: {existing} is not writable by this user"


def _tls(directory: Path) -> Iterator[str]:
    try:
        ends = expiry(Credentials.read(directory).certificate)
    except (OSError, ValueError) as error:
        yield f"tls_dir: {error}"
        return
    if ends < dt.datetime.now(dt.UTC) + _SOON:
        yield f"tls_dir: the bridge's certificate expires {ends:%Y-%m-%d}"


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
