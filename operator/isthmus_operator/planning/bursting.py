"""How many clients a cloud pool has: more while HPC clients wait in their queues, fewer once all of them are there."""

from isthmus_contracts.api.federated_job import Pool

from ..state.job_record import CloudRecord
from .context import PlanContext
from .hpc_arrays import current, leaving_parts_of, parts_of


def wanted(context: PlanContext, pool: Pool, record: CloudRecord) -> int:
    """The pool's number of clients now, which the record remembers."""
    if pool.size == pool.fewest:
        return pool.replicas
    before = pool.replicas if record.size is None else min(max(pool.fewest, record.size), pool.size)
    target = _target(context, pool, record)
    # It grows at once; it shrinks only for clients that are there, not for such as are about to be.
    now = target if target > before or _connected(context) else before
    record.size = None if now == pool.replicas else now
    return now


def _target(context: PlanContext, pool: Pool, record: CloudRecord) -> int:
    waiting, running, all_known = 0, 0, True
    for other in context.spec.pools:
        if other.hpc is None:
            continue
        views = [current(context, part) for part, _ in parts_of(context.record, other.name)]
        known = [view for view in views if view is not None]
        all_known = all_known and bool(views) and len(known) == len(views)
        ending = [current(context, part) for part, _ in leaving_parts_of(context.record, other.name)]
        # Whose next attempt waits while the present one still runs is no client that is missing.
        there = sum(view.running for view in ending if view is not None)
        waiting += max(0, sum(view.queued for view in known) - there)
        running += sum(view.running for view in known) + there
    if waiting:
        return min(pool.size, pool.replicas + waiting)
    return _smallest(context, pool, record) if all_known and running >= _hpc_clients(context) else pool.replicas


def _smallest(context: PlanContext, pool: Pool, record: CloudRecord) -> int:
    """How far the pool may shrink: clients that are out of restarts are not among the fewest that shall stay."""
    size = pool.fewest
    while size < pool.replicas:
        lost = sum(record.client(index).failures > context.spec.backoff_limit for index in range(size))
        if size - lost >= pool.fewest:
            break
        size += 1
    return size


def _connected(context: PlanContext) -> bool:
    """Whether every HPC client is connected to the aggregator."""
    said = context.observed.federation
    if said is None:
        return False
    there = sum(said.connected.get(pool.name, 0) for pool in context.spec.pools if pool.hpc is not None)
    return there >= _hpc_clients(context)


def _hpc_clients(context: PlanContext) -> int:
    return sum(pool.replicas for pool in context.spec.pools if pool.hpc is not None)
