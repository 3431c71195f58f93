"""Selection of the clients that take part in a round."""

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.fields import exactly

from .client_history import ClientHistory, ClientRecord
from .membership import ClientId

# Oort's constants: the weight of the time since the last round, and the exponent of the penalty for slow clients.
_UNCERTAINTY, _SLOWNESS = 0.1, 2.0
# Quantile at which examples times loss is clipped, as in Oort's section 4.4: clients report both without proof.
_BELIEVED = 0.9
# A client is left out for at most this many times the number of rounds in which all could have been selected once.
_TURNS = 2


@dataclass(frozen=True)
class Choice:
    """Selected clients of a round, and the number of updates that ends it early (``None`` waits for all)."""

    clients: list[ClientId]
    target: int | None


def choose(spec: FederatedJobSpec, number: int, ready: Sequence[ClientId], history: ClientHistory) -> Choice:
    """Return the clients of round ``number``: the same after a restart, if the same clients are ready.

    ``Random`` and ``Adaptive`` take max(fraction * ready, quorum) clients (McMahan et al. 2017, algorithm 1), and
    ``overSelect`` more, without waiting for these (Bonawitz et al., "Towards Federated Learning at Scale", 2019).
    """
    selection, size = spec.selection, spec.strategy.round_size
    if selection.policy == "All":
        return Choice(list(ready), size)
    wanted = min(max(math.ceil(exactly(selection.fraction) * len(ready)), spec.min_clients, 1), len(ready))
    asked = min(math.ceil(wanted * (1 + exactly(selection.over_select))), len(ready))
    # Not for cryptography: the choice must be the same after a restart.
    generator = random.Random(f"{selection.seed}:{number}")  # noqa: S311
    if selection.policy == "Random":
        clients = generator.sample(list(ready), asked)
    else:
        clients = adaptive(ready, asked, number, history, float(selection.exploration), generator)
    target = size or (max(wanted, spec.min_updates) if asked > wanted else None)
    return Choice(clients, target)


def adaptive(
    ready: Sequence[ClientId],
    count: int,
    number: int,
    history: ClientHistory,
    exploration: float,
    generator: random.Random,
) -> list[ClientId]:
    """Return ``count`` of the ready clients, chosen by their history.

    After Lai et al., "Oort: Efficient Federated Learning via Guided Participant Selection" (2021), sections 4.2 to 4.4
    and algorithm 1, with three changes: places are drawn in proportion to utility rather than from the best alone,
    reliability is a factor, and there is a bound on how long a client may be passed over.

    1. Clients that were not asked for more than 2 * ceil(ready / count) rounds come first, longest wait first.
    2. The share ``exploration`` of the places goes to clients that were never asked, then by longest wait.
    3. The other places are drawn without replacement (Efraimidis and Spirakis 2006) in proportion to :func:`utility`.
    """
    chosen: list[ClientId] = []

    def take(candidates: Sequence[ClientId], places: int) -> None:
        left = [client for client in candidates if client not in taken]
        chosen.extend(left[: max(min(places, count - len(chosen)), 0)])
        taken.update(chosen)

    taken: set[ClientId] = set()
    shuffled = generator.sample(list(ready), len(ready))
    by_wait = sorted(shuffled, key=lambda client: history.of(client).asked)
    patience = _TURNS * math.ceil(len(ready) / count)
    take([client for client in by_wait if number - history.of(client).asked > patience], count)
    take(by_wait, math.ceil(exactly(exploration) * count))
    known = {client: history.of(client) for client in ready if history.of(client).known}
    utilities = _utilities(known, number)
    keys = {client: generator.random() ** (1 / max(utilities[client], 1e-9)) for client in shuffled if client in known}
    take(sorted(keys, key=keys.__getitem__, reverse=True), count)
    take(by_wait, count)  # if too few clients have a history
    return chosen


def _utilities(records: dict[ClientId, ClientRecord], number: int) -> dict[ClientId, float]:
    if not records:
        return {}
    losses = [record.loss for record in records.values() if record.loss is not None]
    typical_loss = median(losses) if losses else 1.0
    useful = {
        client: min(
            record.examples * max(typical_loss if record.loss is None else record.loss, 0.0), sys.float_info.max
        )
        for client, record in records.items()
    }
    bound = _believed(list(useful.values()))
    pace = median(record.seconds for record in records.values() if record.seconds is not None)
    return {
        client: utility(min(useful[client], bound) / (bound or 1.0), record, pace, number)
        for client, record in records.items()
    }


def _believed(values: list[float]) -> float:
    """Return the bound at which values are clipped: a quantile, and never the largest of several values, which may be a
    single false report."""
    highest = min(math.ceil(_BELIEVED * len(values)), max(len(values) - 1, 1))
    return sorted(values)[highest - 1]


def utility(useful: float, record: ClientRecord, pace: float, number: int) -> float:
    """Return (useful + sqrt(0.1 ln(round) / last round)) * min(1, pace / seconds)^2 * reliability (Oort, equation 1).

    ``useful``: examples times training loss, scaled to 0..1 by the bound at which it is clipped. ``pace``: the median
    over clients of the seconds from offer to update.
    """
    uncertainty = math.sqrt(_UNCERTAINTY * math.log(max(number, 1)) / max(record.asked, 1))
    speed = min(1.0, pace / record.seconds) if record.seconds else 1.0
    return (useful + uncertainty) * math.pow(speed, _SLOWNESS) * record.reliability
