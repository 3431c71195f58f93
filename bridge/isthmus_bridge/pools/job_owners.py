"""Assignment of the queue's records to pools."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from isthmus_contracts.identities import slurm_job_name
from isthmus_contracts.slurm_states import meaning

from ..files.run_directory import PATTERN_KEY
from ..policy.policy import Policy
from ..slurm.model import TaskRecord
from ..users.sudoers import run_dir

# Key and owner.
Owner = tuple[str, str]
_PREFIX = slurm_job_name("")


def group_by_pool(
    records: Iterable[TaskRecord], policy: Policy
) -> tuple[dict[Owner, list[TaskRecord]], list[TaskRecord]]:
    """Return the records of each pool, and those that belong to no pool.

    A pool's array is identified by its working directory, which only the bridge chooses, or else by its name: users
    and sites change names, and some sites hide the directory.
    """
    pools: dict[Owner, list[TaskRecord]] = defaultdict(list)
    rest: list[TaskRecord] = []
    for record in records:
        key = _by_directory(record, policy) or _by_name(record)
        if key:
            pools[key, record.user].append(record)
        else:
            rest.append(record)
    return pools, rest


def changed_name(records: Sequence[TaskRecord], key: str) -> str:
    """Return the name to which the array, or some of its tasks, was changed; empty if it was not."""
    own = slurm_job_name(key)
    return next((name for name in living_names(records, own) if name != own), "")


def living_names(records: Sequence[TaskRecord], otherwise: str) -> list[str]:
    """Return all names of the live tasks; ``otherwise`` alone if none is listed."""
    return sorted({record.name for record in records if not meaning(record.state).over}) or [otherwise]


def _by_directory(record: TaskRecord, policy: Policy) -> str:
    place = PurePath(record.directory)
    if re.fullmatch(PATTERN_KEY, place.name) is None:
        return ""
    try:
        root = run_dir(policy, record.user) if record.user else policy.run_dir
    except OSError:
        return ""
    return place.name if place.parent == root else ""


def _by_name(record: TaskRecord) -> str:
    return record.name.removeprefix(_PREFIX) if record.name.startswith(_PREFIX) else ""
