"""Selection of the clients of a round."""

import math
import random
from collections import Counter
from typing import Any

import pytest

from isthmus.aggregator.clients.client_history import ClientHistory, ClientRecord, Report
from isthmus.aggregator.clients.membership import ClientId
from isthmus.aggregator.clients.selection import adaptive, choose, utility
from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.manifests.manifest import parse_spec

READY: list[ClientId] = [("p", index) for index in range(10)]
NO_HISTORY = ClientHistory()


def spec(strategy: dict[str, Any] | None = None, **selection: Any) -> FederatedJobSpec:
    return parse_spec(
        {
            "rounds": 5,
            "task": {"image": "x", "command": ["python"]},
            "strategy": strategy or {},
            "selection": {"minClients": 2, **selection},
            "pools": [{"name": "p", "replicas": 1000, "cloud": {}}],
        }
    )


def test_all_selects_every_client_and_waits_for_all() -> None:
    choice = choose(spec(), 1, READY, NO_HISTORY)
    assert (choice.clients, choice.target) == (READY, None)


@pytest.mark.parametrize(
    ("fraction", "ready", "count"), [("0.25", READY, 3), ("0.01", READY, 2), ("0.5", READY[:1], 1), ("1", READY, 10)]
)
@pytest.mark.parametrize("policy", ["Random", "Adaptive"])
def test_a_sample_is_the_fraction_but_never_less_than_the_quorum(
    policy: str, fraction: str, ready: list[ClientId], count: int
) -> None:
    choice = choose(spec(policy=policy, fraction=fraction), 1, ready, NO_HISTORY)
    assert (len(set(choice.clients)), choice.target) == (count, None)


@pytest.mark.parametrize("policy", ["Random", "Adaptive"])
def test_it_is_the_same_after_a_restart_and_differs_between_rounds(policy: str) -> None:
    ready = [("p", index) for index in range(100)]
    sample = spec(policy=policy, fraction="0.1", seed=7)
    assert choose(sample, 3, ready, NO_HISTORY) == choose(sample, 3, ready, NO_HISTORY)
    assert choose(sample, 3, ready, NO_HISTORY) != choose(sample, 4, ready, NO_HISTORY)


def test_random_is_fair_in_the_long_run() -> None:
    sample = spec(policy="Random", fraction="0.3")
    counts = Counter(client for number in range(2000) for client in choose(sample, number, READY, NO_HISTORY).clients)
    # 600 each on average; six standard deviations of a binomial are about 123.
    assert all(477 < counts[client] < 723 for client in READY)


@pytest.mark.parametrize(("over", "asked", "target"), [("0", 4, None), ("0.3", 6, 4), ("9", 10, 4)])
def test_over_selection_asks_more_and_ends_with_the_fastest(over: str, asked: int, target: int | None) -> None:
    choice = choose(spec(policy="Random", fraction="0.4", overSelect=over), 1, READY, NO_HISTORY)
    assert (len(choice.clients), choice.target) == (asked, target)


@pytest.mark.parametrize(
    ("ready", "fraction", "over", "asked"),
    [(50, "1", "0.1", 50), (100, "0.5", "0.1", 55), (180, "0.5", "0.1", 99), (200, "0.5", "0.1", 110),
     (100, "0.07", "0", 7), (100, "0.29", "0", 29), (1000, "0.003", "1e-1", 4)],
)  # fmt: skip
def test_shares_are_the_decimals_of_the_manifest(ready: int, fraction: str, over: str, asked: int) -> None:
    clients = [("p", index) for index in range(ready)]
    for policy in ("Random", "Adaptive"):
        sample = spec(policy=policy, fraction=fraction, overSelect=over)
        assert len(choose(sample, 1, clients, NO_HISTORY).clients) == asked


@pytest.mark.parametrize(("strategy", "target"), [({"algorithm": "FedAsync"}, 1), ({"algorithm": "FedBuff"}, 10)])
def test_asynchronous_rounds_select_all_clients_and_end_early(strategy: dict[str, Any], target: int) -> None:
    choice = choose(spec(strategy), 1, READY, NO_HISTORY)
    assert (choice.clients, choice.target) == (READY, target)


def test_utility_is_the_formula() -> None:
    record = ClientRecord(examples=10, loss=2.0, seconds=4.0, reliability=0.5, asked=3, counted=(3,))
    uncertainty = math.sqrt(0.1 * math.log(9) / 3)
    assert utility(0.7, record, 2.0, 9) == pytest.approx((0.7 + uncertainty) * (2.0 / 4.0) ** 2 * 0.5)
    # More speed than the median's does not count.
    assert utility(0.7, record, 8.0, 9) == utility(0.7, record, 4.0, 9)


def simulate(rounds: int, count: int, exploration: float = 0.2, **records: dict[int, Any]) -> Counter[ClientId]:
    """Return how often each client is chosen. ``records``: fields in which single clients differ from the others."""
    history, counts = NO_HISTORY, Counter[ClientId]()
    waits = dict.fromkeys(READY, 0)
    for number in range(1, rounds + 1):
        chosen = adaptive(READY, count, number, history, exploration, random.Random(number))  # noqa: S311
        assert len(set(chosen)) == count
        counts.update(chosen)
        reports, missed = [], {}
        for client in chosen:
            waits[client] = number
            if records.get("fails", {}).get(client[1]):
                missed[client] = None
                continue
            examples = records.get("examples", {}).get(client[1], 100)
            loss = records.get("loss", {}).get(client[1], 1.0)
            seconds = records.get("seconds", {}).get(client[1], 1.0)
            reports.append((client, Report(number, examples, loss, seconds)))
        history = history.after_round(number, chosen, missed, reports, 5)
        # Bound on waiting: twice the rounds of one turn, and at most one more turn if many have waited that long.
        assert all(number - wait <= 3 * math.ceil(len(READY) / count) for wait in waits.values()), waits
    return counts


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_no_client_starves(count: int) -> None:
    counts = simulate(300, count, seconds={0: 1000.0}, examples={1: 1}, loss={2: 0.0}, fails={3: True})
    assert set(counts) == set(READY)


@pytest.mark.parametrize(("examples", "loss"), [(2**53, 1e10), (2**53, 1e308), (2**53, 1.0), (100, 1e308)])
def test_a_client_that_exaggerates_is_not_asked_more_than_others(examples: int, loss: float) -> None:
    honest = simulate(400, 3)
    lying = simulate(400, 3, examples={0: examples}, loss={0: loss})
    assert lying[READY[0]] <= 1.3 * max(honest.values())


def test_more_data_and_higher_losses_are_chosen_more() -> None:
    counts = simulate(400, 3, examples=dict.fromkeys(range(5), 300))
    assert min(counts[client] for client in READY[:5]) > max(counts[client] for client in READY[5:])


@pytest.mark.parametrize(
    "worse", [{"seconds": {0: 10.0}}, {"examples": {0: 5}}, {"loss": {0: 0.05}}, {"fails": {0: True}}]
)
def test_slow_small_satisfied_and_unreliable_clients_are_chosen_less(worse: dict[str, dict[int, Any]]) -> None:
    counts = simulate(400, 3, **worse)
    others = sorted(counts[client] for client in READY[1:])
    assert counts[READY[0]] < 0.8 * others[0]


def test_every_client_is_tried_early() -> None:
    counts = simulate(8, 3)
    assert set(counts) == set(READY)


def test_without_exploration_places_go_by_utility_alone() -> None:
    useful = ClientRecord(examples=100, loss=1.0, seconds=1.0, asked=5, counted=(5,))
    useless = ClientRecord(examples=100, loss=1.0, seconds=1.0, reliability=0.0, asked=5, counted=(5,))
    history = ClientHistory({client: useful if client[1] < 3 else useless for client in READY})
    assert set(adaptive(READY, 3, 6, history, 0.0, random.Random(0))) == set(READY[:3])  # noqa: S311


def test_the_history_is_stored_as_text() -> None:
    reports = [(READY[0], Report(4, 50, None, 2.5)), (READY[1], Report(3, 7, 0.25, 1.0))]
    history = NO_HISTORY.after_round(4, READY[:3], {READY[2]: None}, reports, 5).after_round(
        5, READY[:1], {READY[0]: 9.0}, [], 5
    )
    assert ClientHistory.of_text(history.text()) == history
    assert history.of(READY[0]) == ClientRecord(50, None, 9.0, 1.0, 5, (4,), (4, 5))
    assert history.of(READY[1]).counted == (3,)
    assert history.of(READY[2]).reliability == pytest.approx(0.7)
    assert NO_HISTORY.records == {}
    with pytest.raises(ValueError, match="not a history"):
        ClientHistory.of_text("[1]")
