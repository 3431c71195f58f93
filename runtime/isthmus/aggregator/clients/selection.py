"""Which of the ready clients take part in a round."""

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

# Oort's constants: the weight of time since the last round, and how hard slowness is punished.
_UNCERTAINTY, _SLOWNESS = 0.1, 2.0
# Examples times loss count up to this quantile of all clients', as in Oort's section 4.4: both are what clients say.
_BELIEVED = 0.9
# Nobody is passed over for more than so many times the rounds in which everybody could have had a turn.
_TURNS = 2


@dataclass(frozen=True)
class Choice:
    """Who is asked in a round, and with how many updates it ends early (``None``: it waits for all of them)."""

    clients: list[ClientId]
    target: int | None


def choose(spec: FederatedJobSpec, number: int, ready: Sequence[ClientId], history: ClientHistory) -> Choice:
    """The clients of round ``number``; the same ones after a restart, where the same ones are ready.

    ``Random`` and ``Adaptive`` take max(fraction * ready, quorum) clients (McMahan et al. 2017, algorithm 1), and
    ``overSelect`` more, without waiting for these (Bonawitz et al., "Towards Federated Learning at Scale", 2019).
    """
    selection, size = spec.selection, spec.strategy.round_size
    if selection.policy == "All":
        return Choice(list(ready), size)
    wanted = min(max(math.ceil(exactly(selection.fraction) * len(ready)), spec.min_clients, 1), len(ready))
    asked = min(math.ceil(wanted * (1 + exactly(selection.over_select))), len(ready))
    # Not for secrecy: the choice must be the same one after a restart.
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
    """``count`` of the ready clients, by what is known of them.

    After Lai et al., "Oort: Efficient Federated Learning via Guided Participant Selection" (2021), sections 4.2 to 4.4
    and algorithm 1, with three changes: places are drawn in proportion to utility rather than from the best alone,
    reliability is a factor, and there is a bound on how long a client may be passed over.

    1. Who was not asked for more than 2 * ceil(ready / count) rounds has a place, those that waited longest first.
    2. The share ``exploration`` of the places is for those that were never asked, then for those not asked longest.
    3. The others are drawn without replacement (Efraimidis and Spirakis 2006) in proportion to :func:`utility`.
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
    take(by_wait, count)  # where too few are known
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
    """The quantile up to which values are believed; never the largest of several, which may be one liar's."""
    highest = min(math.ceil(_BELIEVED * len(values)), max(len(values) - 1, 1))
    return sorted(values)[highest - 1]


def utility(useful: float, record: ClientRecord, pace: float, number: int) -> float:
    """(useful + sqrt(0.1 ln(round) / last round)) * min(1, pace / seconds)^2 * reliability; Oort, equation 1.

    ``useful``: examples times training loss, from 0 to 1 in relation to the most that is believed of any client;
    ``pace``: the median client's seconds from offer to update.
    """
    uncertainty = math.sqrt(_UNCERTAINTY * math.log(max(number, 1)) / max(record.asked, 1))
    speed = min(1.0, pace / record.seconds) if record.seconds else 1.0
    return (useful + uncertainty) * math.pow(speed, _SLOWNESS) * record.reliability
