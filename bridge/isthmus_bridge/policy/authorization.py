"""Decisions about one caller and one request under the policy. Pure functions."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import ip_address

from isthmus_contracts.pb import bridge_pb2 as pb

from ..clients_per_job import jobs_for, per_job
from ..slurm.model import Gres
from ..slurm.options import Options
from .parts import AllCallers, Limits, merged
from .policy import Environment, Identity, Policy
from .privacy import broken_rule

_MINUTE = 60
# A pattern of IP addresses: 10.1.* must not match the name 10.1.example.org.
_NUMERIC = re.compile(r"[0-9.*?!\[\]-]*[0-9][0-9.*?!\[\]-]*")
# An IPv6 address or a pattern of such addresses: [2001:db8::*]:7443.
_IN_BRACKETS = re.compile(r"\[[0-9A-Fa-f*?]*:[0-9A-Fa-f:.*?]*\]")


@dataclass(frozen=True)
class Denial:
    """The policy denies the request. ``rule``: the path of the rule in the policy."""

    rule: str
    message: str

    def __str__(self) -> str:
        return f"policy {self.rule}: {self.message}"


@dataclass(frozen=True)
class Grant:
    """The policy grants the request. The names in the request are resolved."""

    partition: str
    account: str
    qos: str
    environment: Environment
    options: Options
    """The site's own options for sbatch."""
    data: str
    """Path of the data set; empty if there is none."""
    image: str
    """The job's image, if the environment runs it."""
    gres: tuple[Gres, ...]
    endpoint: str
    """The address (host:port) where the tasks reach the aggregator: its own, or the relay's."""
    user: str = ""
    """The local user who owns the tasks; empty for the bridge's own user."""
    running_tasks: int = 0
    """Limit of clients of an array that run at the same time; 0 for no limit."""


def identify(policy: Policy, uris: Sequence[str]) -> Identity | Denial:
    """Return the caller with one of the URIs, which come from its certificate."""
    for identity in policy.identities:
        if identity.uri in uris:
            return identity
    shown = ", ".join(uris) if uris else "a certificate without a URI"
    return Denial("identities", f"{shown!r} is not known at this site")


def accounts_of(policy: Policy, identity: Identity) -> list[str]:
    """Return the accounts that a caller may charge; the first is its default."""
    return policy.accounts if identity.accounts is None else identity.accounts


def partitions_of(policy: Policy, identity: Identity) -> list[str]:
    """Return the partitions that a caller may use; the first is its default."""
    return policy.partitions if identity.partitions is None else identity.partitions


def qos_of(policy: Policy, identity: Identity) -> list[str]:
    """Return the QOS that a caller may name."""
    return policy.qos if identity.qos is None else identity.qos


def environments_of(policy: Policy, identity: Identity) -> list[str]:
    """Return the names of the environments that a caller may use."""
    return list(policy.environments) if identity.environments is None else identity.environments


def data_sets_of(policy: Policy, identity: Identity) -> list[str]:
    """Return the names of the data sets that a caller may use."""
    return list(policy.data_sets) if identity.data_sets is None else identity.data_sets


def takes_code(policy: Policy, identity: Identity) -> bool:
    """Return whether a caller's users may send files of their own."""
    return policy.code_files if identity.code_files is None else identity.code_files


def limits_of(policy: Policy, identity: Identity) -> Limits:
    """Return the limits of a caller: its own, and the site's for those that it does not set."""
    own = identity.limits
    if own is None:
        return policy.limits
    return policy.limits.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})


def widest(policy: Policy) -> Limits:
    """Return the highest limit of each kind that any caller has on its requests."""
    every = [limits_of(policy, identity) for identity in policy.identities]
    names = ("replicas", "cpus_per_task", "memory_mib", "time_limit_seconds")
    return policy.limits.model_copy(update={name: max(getattr(one, name) for one in every) for name in names})


def asks_for_memory(policy: Policy) -> bool:
    """Return whether any job requests memory from Slurm."""
    return any(
        options_of(policy, identity, partition, policy.environments[name])[0].memory != "none"
        for identity in policy.identities
        for partition in partitions_of(policy, identity) or [""]
        for name in environments_of(policy, identity)
    )


def options_of(policy: Policy, identity: Identity, partition: str, environment: Environment) -> tuple[Options, str]:
    """Return the site's options of sbatch for a job, and the QOS for manifests that name none."""
    return merged((policy.sbatch, policy.partition_sbatch.get(partition), environment.sbatch, identity.sbatch))


def draining(policy: Policy, identity: Identity) -> Denial | None:
    """Return the denial if the site currently accepts no new pools from this caller."""
    if policy.drain is not None:
        return Denial("drain", f"this site takes no new jobs for now: {policy.drain}")
    if identity.drain is not None:
        return Denial("identities.drain", f"this site takes no new jobs of {identity.uri} for now: {identity.drain}")
    return None


def decide(policy: Policy, identity: Identity, spec: pb.PoolSpec) -> Grant | Denial:
    """Check a well-formed spec against every rule, and return the grant or the first denial."""
    who = identity.uri
    if not any(fnmatchcase(spec.namespace, pattern) for pattern in identity.namespaces):
        return _not_allowed("namespaces", spec.namespace, who, identity.namespaces)
    partitions = partitions_of(policy, identity)
    partition = spec.partition or next(iter(partitions), "")
    if partition and partition not in partitions:
        return _not_allowed("partitions", partition, who, partitions)
    accounts = accounts_of(policy, identity)
    account = spec.account or next(iter(accounts), "")
    if account and account not in accounts:
        return _not_allowed("accounts", account, who, accounts)
    if spec.qos and spec.qos not in (listed := qos_of(policy, identity)):
        return _not_allowed("qos", spec.qos, who, listed)
    environments = environments_of(policy, identity)
    if spec.environment not in environments:
        return _not_allowed("environments", spec.environment, who, environments)
    environment = policy.environments[spec.environment]
    if denial := _image(environment, spec, who):
        return denial
    data_sets = data_sets_of(policy, identity)
    if spec.data_ref and spec.data_ref not in data_sets:
        return _not_allowed("data_sets", spec.data_ref, who, data_sets)
    data = policy.data_sets[spec.data_ref] if spec.data_ref else ""
    if spec.code and not takes_code(policy, identity):
        return Denial(
            "code_files", f"{min(spec.code)!r} is not allowed for {who}; this site takes no files (task.code)"
        )
    if denial := _variables(policy, environment, spec, who):
        return denial
    if denial := _caps(limits_of(policy, identity), spec, who):
        return denial
    if broken := broken_rule(policy.privacy, spec, runs_image=environment.runs_image):
        return Denial(*broken)
    gres = tuple(Gres(item.name, item.type, item.count) for item in spec.gres)
    image = spec.image if environment.runs_image else ""
    endpoint = _endpoint(policy, spec, who)
    if isinstance(endpoint, Denial):
        return endpoint
    options, qos = options_of(policy, identity, partition, environment)
    return Grant(
        partition, account, spec.qos or qos, environment, options, str(data), image, gres, endpoint,
        identity.user or "", limits_of(policy, identity).running_tasks or 0,
    )  # fmt: skip


def too_many(
    policy: Policy,
    identity: Identity,
    spec: pb.PoolSpec,
    live: Sequence[pb.PoolSpec],
    recent: int,
    everyone: Sequence[pb.PoolSpec] = (),
) -> Denial | None:
    """Return why a caller may not have one more pool; ``None`` if it may.

    ``live``: the caller's live pools; ``recent``: how many it requested within a day; ``everyone``: the live pools of
    all callers.
    """
    limits, every = limits_of(policy, identity), policy.all_callers
    if len(live) >= limits.pools:
        return Denial("limits.pools", f"{identity.uri} has {len(live)} live pools; at most {limits.pools}")
    if limits.pools_per_day is not None and recent >= limits.pools_per_day:
        message = f"{identity.uri} has requested {recent} pools within a day; at most {limits.pools_per_day}"
        return Denial("limits.pools_per_day", message)
    if every.pools is not None and len(everyone) >= every.pools:
        return Denial("all_callers.pools", f"all callers have {len(everyone)} live pools; at most {every.pools}")
    return _beyond("limits", identity.uri, limits, spec, live) or _beyond(
        "all_callers", "all callers together", every, spec, everyone
    )


def _beyond(
    part: str, whose: str, limits: Limits | AllCallers, spec: pb.PoolSpec, live: Iterable[pb.PoolSpec]
) -> Denial | None:
    caps: dict[str, int | None] = {
        "total_tasks": limits.total_tasks,
        "total_cpus": limits.total_cpus,
        "total_memory_mib": limits.total_memory_mib,
        **{f"total_gres.{name}": most for name, most in limits.total_gres.items()},
    }
    totals = Counter[str]()
    for one in live:
        totals.update(_amounts(one, limits.total_gres))
    mine = _amounts(spec, limits.total_gres)
    for rule, most in caps.items():
        if most is not None and mine[rule] and totals[rule] + mine[rule] > most:
            have = "has" if part == "limits" else "have"
            return Denial(
                f"{part}.{rule}", f"{mine[rule]} more than the {totals[rule]} that {whose} {have}; at most {most}"
            )
    return None


def _amounts(spec: pb.PoolSpec, capped: Iterable[str]) -> Counter[str]:
    # All jobs of an array are equal: the last one holds as much as the others, even if it starts fewer clients.
    holding = jobs_for(spec) * per_job(spec)
    amounts = Counter(
        total_tasks=spec.replicas,
        total_cpus=holding * spec.cpus_per_task,
        total_memory_mib=holding * spec.memory_mib,
    )
    for name in capped:
        amounts[f"total_gres.{name}"] = holding * _of_name(spec, name)
    return amounts


def _of_name(spec: pb.PoolSpec, name: str) -> int:
    """Return how many of a resource, or of one type of it, a client may get. A request without a type may get any
    type."""
    kind, _, wanted = name.partition(":")
    return sum(gres.count for gres in spec.gres if gres.name == kind and (not wanted or gres.type in ("", wanted)))


def _endpoint(policy: Policy, spec: pb.PoolSpec, who: str) -> str | Denial:
    endpoint = spec.federation.endpoint
    if not spec.federation.via_bridge:
        return endpoint
    if policy.relay is None:
        return Denial("relay", "this site's bridge relays nothing; its nodes must reach the aggregator themselves")
    if any(_may_dial(endpoint, pattern) for pattern in policy.relay.destinations):
        return policy.relay.address
    return _not_allowed("relay.destinations", endpoint, who, policy.relay.destinations)


def _may_dial(endpoint: str, pattern: str) -> bool:
    if _IN_BRACKETS.match(pattern):
        # Escape the bracket, because it would start a character class.
        pattern = f"[[]{pattern[1:]}"
        return fnmatchcase(endpoint, pattern)
    if not fnmatchcase(endpoint, pattern):
        return False
    host = pattern.rpartition(":")[0] or pattern
    return _NUMERIC.fullmatch(host) is None or _is_address(endpoint.rpartition(":")[0])


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _image(environment: Environment, spec: pb.PoolSpec, who: str) -> Denial | None:
    if not environment.runs_image:
        return None
    if any(fnmatchcase(spec.image, pattern) for pattern in environment.images):
        return None
    return _not_allowed(f"environments.{spec.environment}.images", spec.image, who, environment.images)


def _variables(policy: Policy, environment: Environment, spec: pb.PoolSpec, who: str) -> Denial | None:
    rules = {"env_denied": policy.env_denied, f"environments.{spec.environment}.env_denied": environment.env_denied}
    for name in spec.env:
        for rule, patterns in rules.items():
            if pattern := next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None):
                return Denial(rule, f"{name!r} is not allowed for {who}; denied: {pattern}")
    return None


def _caps(limits: Limits, spec: pb.PoolSpec, who: str) -> Denial | None:
    share = per_job(spec)
    if limits.running_tasks is not None and share > limits.running_tasks:
        message = f"{share} clients share a job; at most {limits.running_tasks} of a pool may run at the same time"
        return Denial("limits.running_tasks", message)
    for name in ("replicas", "cpus_per_task", "memory_mib", "time_limit_seconds"):
        wanted, most = getattr(spec, name), getattr(limits, name)
        if name == "replicas":
            # A part by which a pool grows counts together with the earlier parts.
            wanted += spec.first_index
        if name in ("cpus_per_task", "memory_mib"):
            wanted *= share
        why = ""
        if name == "time_limit_seconds" and most % _MINUTE:
            # Time limits in Slurm are whole minutes, rounded up.
            why = f" ({most} in whole minutes)"
            most -= most % _MINUTE
        if wanted > most:
            return Denial(f"limits.{name}", f"{wanted} is more than the {most} that the site allows{why}")
    for gres in spec.gres:
        asked = f"{gres.name}:{gres.type}" if gres.type else gres.name
        if gres.name in limits.gres or asked in limits.gres:
            continue
        types = [name for name in limits.gres if name.startswith(f"{gres.name}:")]
        if types and not gres.type:
            return Denial("limits.gres", f"{gres.name!r} needs a type at this site; allowed: {', '.join(types)}")
        return _not_allowed("limits.gres", asked, who, limits.gres)
    for name, most in limits.gres.items():
        count = share * _of_name(spec, name)
        if count > most:
            untyped = ":" in name and any(not gres.type and gres.name == name.partition(":")[0] for gres in spec.gres)
            why = "; a request without a type counts as each" if untyped else ""
            return Denial("limits.gres", f"{name}:{count} is more than the {most} that the site allows{why}")
    return None


def _not_allowed(rule: str, value: str, who: str, allowed: Iterable[str]) -> Denial:
    listed = ", ".join(allowed) or "none"
    return Denial(rule, f"{value!r} is not allowed for {who}; allowed: {listed}")
