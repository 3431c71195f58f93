"""Tells an admin whether Slurm can be reached from here, and what of it the bridge can use."""

import shutil
from collections.abc import Iterator

from .gateway_check import reach
from .policy import Policy
from .server import slurm_adapter
from .slurm.cli import CliAdapter
from .slurm.model import SiteDescription, SlurmError

_PROGRAMS = ("sbatch", "squeue", "scancel", "scontrol", "sacct", "sinfo", "timeout")
_OLDEST = (22, 5)


def examine(policy: Policy) -> Iterator[tuple[bool, str]]:
    """Lines, each with whether it is well."""
    for gateway in policy.gateways:
        yield reach(gateway, policy.tls_dir)
    path = f"{policy.slurm.bin_dir}:/usr/local/bin:/usr/bin:/bin" if policy.slurm.bin_dir else None
    missing = [program for program in _PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        yield False, f"programs: {', '.join(missing)} not found in PATH; name their folder as slurm.bin_dir"
        return
    yield True, f"programs: {', '.join(_PROGRAMS)} found"
    adapter = slurm_adapter(policy)
    try:
        described = adapter.describe()
        jobs = adapter.jobs()
    except SlurmError as error:
        yield False, f"CLI adapter: does not work: {error}"
        return
    yield _new_enough(described), f"CLI adapter: works; Slurm {described.version}, cluster {described.cluster}"
    yield True, f"queue: squeue answers; {len({job.array_id for job in jobs})} arrays of bridges of this user"
    yield _accounts(described)
    if policy.limits.replicas > described.max_array_size:
        message = f"arrays: limits.replicas is {policy.limits.replicas}, but MaxArraySize {described.max_array_size}"
        yield False, f"{message}: larger pools will be refused by Slurm"
    else:
        yield True, f"arrays: up to {described.max_array_size} tasks (MaxArraySize)"
    yield from _partitions(policy, adapter)


def _new_enough(described: SiteDescription) -> bool:
    numbers = [int(word) for word in described.version.split(".")[:2] if word.isdecimal()]
    return tuple(numbers) >= _OLDEST


def _accounts(described: SiteDescription) -> tuple[bool, str]:
    if described.accounting:
        return True, f"finished jobs: `{described.accounting}` tells how they ended"
    return True, "finished jobs: no accounts can be read; the tasks' own marks in run_dir tell how they ended"


def _partitions(policy: Policy, adapter: CliAdapter) -> Iterator[tuple[bool, str]]:
    try:
        known = adapter.partitions()
    except SlurmError as error:
        yield False, f"partitions: {error}"
        return
    lacking = [name for name in policy.partitions if name not in known]
    if lacking:
        yield False, f"partitions: {', '.join(lacking)} of the policy are not in Slurm, which has {', '.join(known)}"
    else:
        yield True, f"partitions: {', '.join(policy.partitions)} are there"
