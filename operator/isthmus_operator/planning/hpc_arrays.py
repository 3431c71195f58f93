"""The arrays of an HPC pool: usually one, and more after it has grown or while the next attempt is already queued.

Each array has a record of its own for a range of the pool's clients. Attempt numbers rise over all arrays of a pool, so
that each key is used once and a client's newer start always fences its older ones.
"""

from isthmus_contracts.api.federated_job import Pool

from ..render import hpc as render
from ..state.job_record import ArrayKey, ArrayRecord, Record
from ..state.observed import PoolPhase, PoolView
from .actions import ShrinkPool
from .context import PlanContext

Array = tuple[ArrayKey, ArrayRecord]


def arrays_of(record: Record, pool: str) -> list[Array]:
    """Return the pool's arrays that run or are to run, by their first client."""
    found = [item for item in _all_of(record, pool) if not item[1].retiring]
    return sorted(found, key=lambda item: item[1].first)


def retiring_arrays_of(record: Record, pool: str) -> list[Array]:
    """Return the pool's arrays that are not submitted again once they end."""
    return [item for item in _all_of(record, pool) if item[1].retiring]


def holder(record: Record, pool: str, index: int) -> ArrayRecord | None:
    """Return the array that runs the pool's client ``index``."""
    return next((array for _, array in arrays_of(record, pool) if array.first <= index < array.stop), None)


def next_attempt(record: Record, pool: str) -> int:
    """Return a number above every attempt of the pool so far."""
    attempts = [array.attempt for _, array in _all_of(record, pool)]
    return 1 + max([*attempts, record.attempts.get(pool, -1)])


def current(context: PlanContext, key: ArrayKey) -> PoolView | None:
    """Return what the site reports of the array's current attempt."""
    view, array = context.observed.pools.get(key), context.record.hpc.get(key)
    return view if view is not None and array is not None and view.attempt == array.attempt else None


def resize(context: PlanContext, pool: Pool) -> None:
    """Make the arrays cover the number of clients that the manifest wants, without disturbing those that stay."""
    arrays = arrays_of(context.record, pool.name)
    if not arrays:
        return
    _, main = arrays[0]
    _forget_ended(context, pool.name, main)
    arrays = arrays_of(context.record, pool.name)
    if len(arrays) == 1 and not main.at_site:
        # Nothing is at the site, so the next attempt simply has the new size.
        main.size = pool.replicas
        return
    for key, array in _all_of(context.record, pool.name):
        if array.first >= pool.replicas:
            array.retiring = True
        else:
            array.size = min(array.size, pool.replicas - array.first)
            _shrink(context, key, array)
    covered = max(array.stop for _, array in arrays)
    if covered < pool.replicas and not main.cancelling and not main.ended:
        attempt = next_attempt(context.record, pool.name)
        grown = ArrayRecord(main.site, attempt=attempt, first=covered, size=pool.replicas - covered)
        context.record.hpc[ArrayKey(pool.name, attempt)] = grown


def replace_array(context: PlanContext, key: ArrayKey) -> None:
    """Add an array for the next attempt of ``key``, which keeps running until it ends by itself."""
    old = context.record.hpc[key]
    attempt = next_attempt(context.record, key.pool)
    old.retiring = True
    successor = ArrayRecord(old.site, attempt=attempt, failures=old.failures, first=old.first, size=old.size)
    context.record.hpc[ArrayKey(key.pool, attempt)] = successor


def _all_of(record: Record, pool: str) -> list[Array]:
    return [(key, array) for key, array in record.hpc.items() if key.pool == pool]


def _forget_ended(context: PlanContext, pool: str, main: ArrayRecord) -> None:
    """Drop arrays of which nothing is left: retiring ones and, after a suspension, all but the first."""
    for key, array in _all_of(context.record, pool):
        if array is main or not (array.retiring or (main.ended and not main.given_up)):
            continue
        view = current(context, key)
        absent = view is not None and view.phase is PoolPhase.ABSENT and array.confirmed
        if not array.at_site or absent or (view is not None and view.ended):
            attempts = context.record.attempts
            attempts[pool] = max(attempts.get(pool, -1), array.attempt)
            del context.record.hpc[key]


def _shrink(context: PlanContext, key: ArrayKey, array: ArrayRecord) -> None:
    view = current(context, key)
    if view is None or view.ended or view.phase is PoolPhase.ABSENT or array.cancelling or view.desired <= array.size:
        return
    context.requeue_after(context.options.resync)
    if context.may_call_site(key):
        request = render.key(context.options.cluster, context.job, key.pool, array.attempt)
        context.actions.append(ShrinkPool(key, array.site, request, array.size))
