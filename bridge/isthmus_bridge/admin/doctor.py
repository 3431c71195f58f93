"""The `doctor` command: which adapters reach Slurm from this machine, and what the bridge can use of it."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from isthmus_contracts.slurm_states import meaning
from isthmus_contracts.wire.parties import PartyError

from .. import slurm_adapters
from ..network.gateway_check import reach
from ..parties import signing_root
from ..policy.authorization import widest
from ..policy.policy import Policy
from ..pools import job_owners
from ..slurm.environment import DEFAULT_PATH
from ..slurm.model import SiteDescription, SlurmAdapter, SlurmError, TaskRecord
from ..slurm.unix_users import uid_of
from ..users import doctor as users
from ..users.user_checks import local_users
from . import site_limits
from .site_limits import Line

_PROGRAMS = ("sbatch", "squeue", "scancel", "scontrol", "sacct", "sinfo", "timeout")
_OLDEST = (22, 5)
_NAMES = {"cli": "CLI", "rest": "REST", "pyslurm": "pyslurm"}


def examine(policy: Policy) -> Iterator[Line]:
    """Yield (good, message) for each check; ``None`` for a note. A failing adapter that is not in use is no problem."""
    for gateway in policy.gateways:
        yield reach(gateway, policy.tls_dir)
    chosen = policy.slurm.adapter
    in_use: _Works | None = None
    for name, shown in _NAMES.items():
        found = _adapter(policy, name)
        works = isinstance(found, _Works)
        use = "in use" if name == chosen else "not in use"
        yield works or name != chosen, f"{shown} adapter ({use}): {found.line if isinstance(found, _Works) else found}"
        if isinstance(found, _Works) and name == chosen:
            in_use = found
    yield _root(policy)
    yield from users.examine(policy)
    if in_use is None:
        return
    yield from _queue(policy, in_use.jobs)
    yield from users.visibility(policy, in_use.described)
    yield _accounts(in_use.described)
    yield _arrays(policy, in_use.described)
    yield from _partitions(policy, in_use.adapter)
    yield from site_limits.examine(policy, in_use.described)


def _root(policy: Policy) -> Line:
    try:
        root = signing_root.public(policy.tls_dir)
    except (OSError, PartyError) as error:
        return False, f"secure aggregation: {error}"
    if not root:
        return None, "secure aggregation: this site has no root; `isthmus-bridge certs --host` creates it"
    return True, f"secure aggregation: party {policy.site}, root {root}"


@dataclass(frozen=True)
class _Works:
    """An adapter that works."""

    adapter: SlurmAdapter
    described: SiteDescription
    jobs: Sequence[TaskRecord]
    line: str


def _adapter(policy: Policy, name: str) -> _Works | str:
    """Return what the adapter found, or why it does not work on this machine."""
    slurm = policy.slurm
    adapter: SlurmAdapter
    extra = ""
    try:
        if name == "cli":
            path = f"{slurm.bin_dir}:{DEFAULT_PATH}" if slurm.bin_dir else None
            if missing := [program for program in _PROGRAMS if shutil.which(program, path=path) is None]:
                return f"{', '.join(missing)} not found in PATH; set slurm.bin_dir to their folder"
            adapter = slurm_adapters.cli(slurm, policy=policy)
        elif name == "rest":
            if slurm.rest is None:
                return "not configured; set slurm.rest to the address of slurmrestd and a source of tokens"
            adapter = rest = slurm_adapters.rest(slurm, slurm.rest)
            extra = f", API v0.0.{rest.version()} at {slurm.rest.url}"
        else:
            adapter = slurm_adapters.pyslurm(slurm)
        described = adapter.describe()
        jobs = adapter.jobs(_visible(policy, described) if name == policy.slurm.adapter else ())
    except SlurmError as error:
        return f"does not work: {error}"
    if not _new_enough(described):
        return f"Slurm {described.version} is too old; 22.05 or newer"
    cluster = f", cluster {described.cluster}" if described.cluster else ""
    return _Works(adapter, described, jobs, f"works; Slurm {described.version}{cluster}{extra}")


def _new_enough(described: SiteDescription) -> bool:
    numbers = [int(word) for word in described.version.split(".")[:2] if word.isdecimal()]
    return tuple(numbers) >= _OLDEST


def _visible(policy: Policy, described: SiteDescription) -> list[str]:
    """Return the local users whose jobs Slurm shows; other checks report problems with the rest."""
    if policy.users is None or (described.private_jobs and not policy.users.operator):
        return []
    return [user for user in local_users(policy) if uid_of(user) is not None]


def _queue(policy: Policy, jobs: Sequence[TaskRecord]) -> Iterator[Line]:
    pools, others = job_owners.group_by_pool((job for job in jobs if not meaning(job.state).over), policy)
    arrays = {job.array_id for (_, user), records in pools.items() for job in records if not user}
    yield True, f"queue: Slurm answers; {len(arrays)} arrays of bridges of this user"
    for user in sorted({job.user for job in others}):
        rest = {job.array_id: job.name for job in others if job.user == user}
        job, name = min(rest.items())
        who = f"the local user {user}" if user else "this user"
        message = f"queue: {len(rest)} jobs of {who} belong to no pool, such as job {job}, {name!r}"
        # Local users may have jobs of their own.
        yield (
            None if user else False,
            f"{message}: the policy does not limit them; use a dedicated user for the bridge's jobs",
        )


def _accounts(described: SiteDescription) -> tuple[bool, str]:
    if described.accounting:
        return True, f"finished jobs: `{described.accounting}` reports how they ended"
    return True, "finished jobs: no accounting available; the tasks' own markers in run_dir record how they ended"


def _arrays(policy: Policy, described: SiteDescription) -> tuple[bool, str]:
    if not described.max_array_size:
        return True, "arrays: this adapter does not report MaxArraySize; Slurm refuses larger arrays"
    most = widest(policy).replicas
    if most > described.max_array_size:
        message = f"arrays: limits.replicas is {most}, but MaxArraySize {described.max_array_size}"
        return False, f"{message}: larger pools will be refused by Slurm"
    return True, f"arrays: up to {described.max_array_size} tasks (MaxArraySize)"


def _partitions(policy: Policy, adapter: SlurmAdapter) -> Iterator[Line]:
    try:
        known = adapter.partitions()
    except SlurmError as error:
        yield False, f"partitions: {error}"
        return
    if not policy.partitions:
        yield True, "partitions: the policy names none; Slurm's default or a plug-in of the site chooses"
        return
    lacking = [name for name in policy.partitions if name not in known]
    if lacking:
        yield (
            False,
            f"partitions: {', '.join(lacking)} of the policy do not exist in Slurm, which has {', '.join(known)}",
        )
    else:
        yield True, f"partitions: {', '.join(policy.partitions)} exist"
