"""The size of bursting cloud pools: more clients while HPC clients are queued, fewer once all of them are connected."""

from isthmus_contracts.api.federated_job import Pool

from ..state.job_record import CloudRecord
from .context import PlanContext
from .hpc_arrays import arrays_of, current, retiring_arrays_of


def wanted(context: PlanContext, pool: Pool, record: CloudRecord) -> int:
    """Return the pool's current number of clients, and store it in the record."""
    if pool.size == pool.fewest:
        return pool.replicas
    before = pool.replicas if record.size is None else min(max(pool.fewest, record.size), pool.size)
    target = _target(context, pool, record)
    # It grows at once, but shrinks only after the HPC clients are connected.
    now = target if target > before or _connected(context) else before
    record.size = None if now == pool.replicas else now
    return now


def _target(context: PlanContext, pool: Pool, record: CloudRecord) -> int:
    waiting, running, all_known = 0, 0, True
    for other in context.spec.pools:
        if other.hpc is None:
            continue
        views = [current(context, key) for key, _ in arrays_of(context.record, other.name)]
        known = [view for view in views if view is not None]
        all_known = all_known and bool(views) and len(known) == len(views)
        ending = [current(context, key) for key, _ in retiring_arrays_of(context.record, other.name)]
        # A client whose next attempt is queued while the current one runs is not missing.
        there = sum(view.running for view in ending if view is not None)
        waiting += max(0, sum(view.queued for view in known) - there)
        running += sum(view.running for view in known) + there
    if waiting:
        return min(pool.size, pool.replicas + waiting)
    return _smallest(context, pool, record) if all_known and running >= _hpc_clients(context) else pool.replicas


def _smallest(context: PlanContext, pool: Pool, record: CloudRecord) -> int:
    """Return the smallest size of the pool. Clients without restarts left do not count towards the minimum."""
    size = pool.fewest
    while size < pool.replicas:
        lost = sum(record.client(index).failures > context.spec.backoff_limit for index in range(size))
        if size - lost >= pool.fewest:
            break
        size += 1
    return size


def _connected(context: PlanContext) -> bool:
    """Return True if every HPC client is connected to the aggregator."""
    federation = context.observed.federation
    if federation is None:
        return False
    there = sum(federation.connected.get(pool.name, 0) for pool in context.spec.pools if pool.hpc is not None)
    return there >= _hpc_clients(context)


def _hpc_clients(context: PlanContext) -> int:
    return sum(pool.replicas for pool in context.spec.pools if pool.hpc is not None)
