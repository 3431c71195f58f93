"""An HPC pool at its site: mostly one array, and more where it has grown, or where the next attempt waits already.

Each part has a record of its own. The one with the pool's own name covers its first clients; numbers of attempts rise
over all parts, so that each key is used once and a client's newer start always fences its older ones.
"""

from dataclasses import replace

from isthmus_contracts.api.federated_job import Pool

from ..render import hpc as render
from ..render.hpc import pool_of
from ..state.job_record import HpcRecord, Record
from ..state.observed import PoolPhase, PoolView
from .actions import ShrinkPool
from .context import PlanContext

Part = tuple[str, HpcRecord]


def parts_of(record: Record, pool: str) -> list[Part]:
    """The pool's parts that run or shall run, by their first client."""
    found = [item for item in _all_of(record, pool) if not item[1].leaving]
    return sorted(found, key=lambda item: item[1].first)


def leaving_parts_of(record: Record, pool: str) -> list[Part]:
    """The pool's parts that end, and are not started again."""
    return [item for item in _all_of(record, pool) if item[1].leaving]


def holder(record: Record, pool: str, index: int) -> HpcRecord | None:
    """The part that runs the pool's client of that index."""
    parts = parts_of(record, pool)
    return next((entry for _, entry in parts if entry.first <= index < entry.end), None)


def next_attempt(record: Record, pool: str) -> int:
    """A number above every one that the pool has used."""
    return 1 + max((max(entry.attempt, entry.newest) for _, entry in _all_of(record, pool)), default=-1)


def current(context: PlanContext, part: str) -> PoolView | None:
    """What the site says of the attempt that the part's record names."""
    view, record = context.observed.pools.get(part), context.record.hpc.get(part)
    return view if view is not None and record is not None and view.attempt == record.attempt else None


def resize(context: PlanContext, pool: Pool) -> None:
    """Has the parts cover as many clients as the manifest wants now, without touching those that stay."""
    main = context.record.hpc.get(pool.name)
    if main is None:
        return
    if not main.size:
        # Of before pools could grow.
        main.size = (context.observed.accepted or context.spec).pool(pool.name).replicas
    _forget_ended(context, pool.name, main)
    parts = parts_of(context.record, pool.name)
    if len(parts) == 1 and _restful(main):
        # Nothing of it is at the site: the next attempt simply has another size.
        main.size = pool.replicas
        return
    for part, entry in _all_of(context.record, pool.name):
        if entry.first >= pool.replicas:
            entry.leaving = True
        else:
            entry.size = min(entry.size, pool.replicas - entry.first)
            _shrink(context, part, entry)
    covered = max(entry.end for _, entry in parts)
    if covered < pool.replicas and not main.cancelling:
        attempt = next_attempt(context.record, pool.name)
        main.newest = attempt
        grown = HpcRecord(main.site, attempt=attempt, first=covered, size=pool.replicas - covered)
        context.record.hpc[f"{pool.name}/{attempt}"] = grown


def replace_array(context: PlanContext, pool: str, part: str) -> None:
    """Puts the next attempt into a part's place; the present one stays until it ends by itself."""
    old = context.record.hpc[part]
    attempt = next_attempt(context.record, pool)
    context.record.hpc[f"{pool}/until-{old.attempt}"] = replace(old, leaving=True, newest=0)
    context.record.hpc[part] = HpcRecord(
        old.site, attempt=attempt, failures=old.failures, first=old.first, size=old.size, newest=old.newest
    )


def _all_of(record: Record, pool: str) -> list[Part]:
    return [(part, entry) for part, entry in record.hpc.items() if pool_of(part) == pool]


def _restful(entry: HpcRecord) -> bool:
    return entry.ended or (not entry.authority and not entry.seen and not entry.cancelling)


def _forget_ended(context: PlanContext, pool: str, main: HpcRecord) -> None:
    """Drops parts of which nothing is left: those that leave; after a suspension all but the first."""
    for part, entry in _all_of(context.record, pool):
        if part == pool or not (entry.leaving or (main.ended and not main.over)):
            continue
        view = current(context, part)
        gone = entry.ended or (view is not None and (view.ended or (view.phase is PoolPhase.ABSENT and entry.seen)))
        if gone or (not entry.authority and not entry.seen):
            main.newest = max(main.newest, entry.attempt)
            del context.record.hpc[part]


def _shrink(context: PlanContext, part: str, entry: HpcRecord) -> None:
    view = current(context, part)
    if view is None or view.ended or view.phase is PoolPhase.ABSENT or entry.cancelling or view.desired <= entry.size:
        return
    context.requeue_after(context.options.resync)
    if context.may_call_site(part):
        key = render.key(context.options.cluster, context.job, part, entry.attempt)
        context.actions.append(ShrinkPool(part, entry.site, key, entry.size))
