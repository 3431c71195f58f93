"""Comparison of the policy's limits with those of Slurm's partitions and associations.

The policy limits what callers request. Only Slurm can limit what a running job submits by itself.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from ..policy.authorization import asks_for_memory, widest
from ..policy.policy import Policy
from ..slurm.cli import last_line, which
from ..slurm.command import CommandOutputTooLong, CommandTimeout, run
from ..slurm.environment import DEFAULT_PATH, program_environment, user_name
from ..slurm.model import SiteDescription
from ..users.user_checks import local_users

Line = tuple[bool | None, str]
"""Good (``None`` for a note, which is neither good nor a problem), and the message."""
_SECONDS = 30.0
_MAX_OUTPUT = 8 << 20
_FIELDS = ("Account", "Partition", "QOS", "MaxWall", "MaxSubmit", "MaxTRES")
_OPEN = frozenset({"", "ALL", "UNLIMITED", "(null)", "N/A", "NONE"})
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_UNITS = {"": 1, "M": 1, "G": 1 << 10, "T": 1 << 20, "K": 1 / (1 << 10)}


def examine(policy: Policy, described: SiteDescription) -> Iterator[Line]:
    """Yield lines about partitions, and about the associations of each user whose jobs run."""
    try:
        partitions = _partitions(_ask(policy, ["scontrol", "show", "partition", "--oneliner"]))
    except OSError as error:
        yield None, f"limits: cannot compare them with Slurm's: {error.strerror}"
        return
    yield from _times_and_memory(policy, partitions)
    users = [*local_users(policy)] + ([user_name({})] if not all(one.user for one in policy.identities) else [])
    for user in users:
        yield from _associations(policy, user, described, partitions)


def _times_and_memory(policy: Policy, partitions: Mapping[str, Mapping[str, str]]) -> Iterator[Line]:
    limits, named_ones = widest(policy), [name for name in policy.partitions if name in partitions]
    short = {name: seconds for name in named_ones
             if (seconds := seconds_of(partitions[name].get("MaxTime", ""))) is not None
             and seconds < limits.time_limit_seconds}  # fmt: skip
    # Jobs that request no memory exceed no limit.
    small = {name: most for name in (named_ones if asks_for_memory(policy) else [])
             if (most := _most_memory(partitions[name], limits.cpus_per_task)) is not None
             and most < limits.memory_mib}  # fmt: skip
    what = (
        (short, "limits.time_limit_seconds", limits.time_limit_seconds, "s", "MaxTime"),
        (small, "limits.memory_mib", limits.memory_mib, "MiB", "MaxMemPerNode or MaxMemPerCPU"),
    )
    for found, field, limit, unit, theirs in what:
        if not found:
            continue
        listed = ", ".join(f"{name} {most:g} {unit}" for name, most in found.items())
        line = f"partitions: {field} is {limit}, but Slurm allows less ({theirs}): {listed}; larger pools never start"
        # A short partition for tests is usual; it is a mistake if no partition accepts what the policy allows.
        yield (False if len(found) == len(named_ones) else None), line
    if not short and not small and named_ones:
        yield True, "partitions: Slurm's MaxTime and memory limits accept all that the policy allows"


def _associations(
    policy: Policy, user: str, described: SiteDescription, partitions: Mapping[str, Mapping[str, str]]
) -> Iterator[Line]:
    further = sorted(name for name, settings in partitions.items()
                     if name not in policy.partitions and _open_to_all(settings))  # fmt: skip
    if further and policy.partitions:
        line = f"user {user}: its jobs may also use the partitions {', '.join(further)}, which the policy does not name"
        yield None, f"{line}; close them with AllowAccounts, AllowGroups, AllowQos or AllocNodes in slurm.conf"
    if described.accounting != "sacct":
        line = "no associations (slurmdbd): Slurm does not limit what its jobs submit by themselves"
        yield None, f"user {user}: {line}"
        return
    argv = ["sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={user}"]
    # The database may also hold those of other clusters.
    argv += [f"cluster={described.cluster}"] if described.cluster else []
    argv.append(f"format={','.join(_FIELDS)}")
    try:
        text = _ask(policy, argv)
    except OSError as error:
        yield None, f"user {user}: cannot read its associations: {error.strerror}"
        return
    rows = [dict(zip(_FIELDS, line.split("|"), strict=False)) for line in text.splitlines() if line.strip()]
    if not rows:
        yield False, f"user {user}: has no association in Slurm; sacctmgr add user {user} account=..."
        return
    yield from _compared(policy, user, rows)


def _compared(policy: Policy, user: str, rows: Sequence[Mapping[str, str]]) -> Iterator[Line]:
    accounts = {row["Account"] for row in rows}
    qos = {name for row in rows for name in row.get("QOS", "").split(",") if name}
    for field, ours, theirs in (("accounts", policy.accounts, accounts), ("qos", policy.qos, qos)):
        if lacking := [name for name in ours if name not in theirs]:
            yield False, f"user {user}: {field} of the policy that Slurm does not allow: {', '.join(lacking)}"
        if ours and (more := sorted(theirs - set(ours))):
            line = f"user {user}: Slurm allows its jobs more than the policy's {field}: {', '.join(more)}"
            yield None, f"{line}; remove them with sacctmgr"
    used = [row for row in rows if not policy.accounts or row["Account"] in policy.accounts]
    for row in used:
        where = f"user {user}, account {row['Account']}"
        if row.get("Partition"):
            where += f", partition {row['Partition']}"
        yield from _row(policy, where, row)
    if all(row.get("MaxSubmit", "") in _OPEN and row.get("MaxTRES", "") in _OPEN for row in used):
        line = "neither MaxSubmitJobs nor MaxTRESPerJob limits what its jobs submit by themselves"
        yield None, f"user {user}: {line}; sacctmgr modify user {user} set MaxSubmitJobs=... MaxTRESPerJob=..."


def _row(policy: Policy, where: str, row: Mapping[str, str]) -> Iterator[Line]:
    limits = widest(policy)
    wall = seconds_of(row.get("MaxWall", ""))
    if wall is not None and wall < limits.time_limit_seconds:
        yield False, f"{where}: MaxWall is {wall} s, but limits.time_limit_seconds {limits.time_limit_seconds}"
    most = row.get("MaxSubmit", "")
    if most.isdecimal() and int(most) < limits.replicas:
        yield False, f"{where}: MaxSubmitJobs is {most}, but limits.replicas {limits.replicas}: each task counts"
    tres = dict(part.partition("=")[::2] for part in row.get("MaxTRES", "").split(",") if "=" in part)
    memory = _mebibytes(tres.get("mem", ""))
    if memory is not None and memory < limits.memory_mib and asks_for_memory(policy):
        yield False, f"{where}: MaxTRESPerJob has mem={tres['mem']}, but limits.memory_mib is {limits.memory_mib}"
    if tres.get("cpu", "").isdecimal() and int(tres["cpu"]) < limits.cpus_per_task:
        yield False, f"{where}: MaxTRESPerJob has cpu={tres['cpu']}, but limits.cpus_per_task is {limits.cpus_per_task}"


def _open_to_all(settings: Mapping[str, str]) -> bool:
    walls = ("AllowGroups", "AllowAccounts", "AllowQos", "AllocNodes")
    return all(settings.get(name, "") in _OPEN for name in walls) and settings.get("RootOnly") != "YES"


def _most_memory(settings: Mapping[str, str], cpus: int) -> float | None:
    for name, factor in (("MaxMemPerNode", 1), ("MaxMemPerCPU", cpus)):
        if (most := _mebibytes(settings.get(name, ""))) is not None:
            return most * factor
    return None


def _mebibytes(text: str) -> float | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", text)
    return float(match[1]) * _UNITS[match[2]] if match else None


def seconds_of(text: str) -> int | None:
    """Parse Slurm's days-hours:minutes:seconds to seconds; ``None`` for no limit. A single number is minutes."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    days, first, second, third = match.groups()
    if days is not None or third is not None:
        hours, minutes, seconds = first, second, third
    else:
        hours, minutes, seconds = "0", first, second
    return ((int(days or 0) * 24 + int(hours)) * 60 + int(minutes or 0)) * 60 + int(seconds or 0)


def _partitions(text: str) -> dict[str, dict[str, str]]:
    found = {}
    for line in text.splitlines():
        settings = dict(word.partition("=")[::2] for word in line.split() if "=" in word)
        if name := settings.get("PartitionName"):
            found[name] = settings
    return found


def _ask(policy: Policy, argv: Sequence[str]) -> str:
    """Run one of Slurm's programs and return its output. Raises ``OSError``."""
    slurm = policy.slurm
    env = {**program_environment(DEFAULT_PATH, os.environ, slurm.bin_dir, slurm.conf), "LC_ALL": "C"}
    program, *rest = argv
    try:
        result = run([which(program, env["PATH"]), *rest], env=env, timeout=_SECONDS, max_output=_MAX_OUTPUT)
    except (CommandTimeout, CommandOutputTooLong) as error:
        raise OSError(5, f"{program}: {error}") from None
    except FileNotFoundError:
        raise OSError(2, f"{program} is not in PATH; set slurm.bin_dir to its folder") from None
    if result.status:
        raise OSError(5, f"{program}: {last_line(result.errors or result.output) or f'exit code {result.status}'}")
    return result.output
