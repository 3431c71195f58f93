"""The account of a job: what a round costs with the noise of the aggregator and of the clients."""

import pytest

from isthmus.aggregator.rounds.privacy_budget import PrivacyBudget, protect
from isthmus.aggregator.storage.round_record import RoundRecord
from isthmus.privacy import Private
from isthmus.strategies import make_strategy
from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.dp_accounting import Spent
from isthmus_contracts.dp_skellam import SkellamSpent, grid_of
from isthmus_contracts.manifests.manifest import parse_spec

PRIVATE = {"clipNorm": "0.5", "noiseMultiplier": "4", "maxEpsilon": "8"}
DISTRIBUTED = {**PRIVATE, "noise": "Distributed"}
ADAPTIVE = {"adaptiveClipping": {"countNoise": "4"}}


def spec_of(private: dict[str, object], **more: object) -> FederatedJobSpec:
    privacy = {"differentialPrivacy": private}
    if private.get("noise") == "Distributed":
        privacy["secureAggregation"] = {}
    pools = [{"name": "cloud", "replicas": 16, "cloud": {}}]
    return parse_spec(
        {"rounds": 3, "task": {"image": "i", "command": ["x"]}, "pools": pools, "privacy": privacy, **more}
    )


def budget_of(private: dict[str, object], **more: object) -> tuple[PrivacyBudget, Private]:
    spec = spec_of(private, **more)
    mechanism, budget = protect(spec, make_strategy(spec.strategy))
    assert isinstance(mechanism, Private) and budget is not None
    return budget, mechanism


def record(number: int, account: dict[str, float]) -> RoundRecord:
    return RoundRecord(number, 1.0, 3, 3, privacy=account)


def test_noise_of_the_aggregator_is_accounted_for_exactly() -> None:
    budget, mechanism = budget_of(PRIVATE)
    assert mechanism.secure_noise().noise_multiplier == 0
    for rounds in (1, 2):
        account = budget.account()
        assert (account["rounds"], account["mu_squared"]) == (rounds, rounds / 16)
        assert account["epsilon"] == Spent().after(4.0, rounds).epsilon(1e-5)
        budget.charge()
    assert budget.status().epsilon == Spent().after(4.0, 2).epsilon(1e-5)


def test_noise_of_the_clients_is_bounded_for_the_fewest_contributors() -> None:
    budget, mechanism = budget_of(DISTRIBUTED)
    noise = mechanism.secure_noise()
    assert (noise.noise_multiplier, noise.contributors, noise.count_noise) == (4.0, 11, 0.0)  # of 16, two thirds
    line = grid_of(32, 16, 4.0, 11).line
    assert budget.account()["epsilon"] == SkellamSpent().after(line).epsilon(1e-5)
    assert Spent().after(4.0).epsilon(1e-5) < budget.account()["epsilon"]


@pytest.mark.parametrize(
    ("more", "contributors"),
    [
        ({}, 11),
        ({"stragglers": {"minUpdates": 14}}, 14),
        ({"selection": {"minClients": 12}}, 12),
        ({"selection": {"policy": "Random", "fraction": "0.5"}}, 6),
    ],
)
def test_the_contributors_are_those_without_whom_no_round_ends(more: dict[str, object], contributors: int) -> None:
    spec = spec_of(DISTRIBUTED, **more)
    assert spec.noise_contributors == contributors <= spec.min_updates
    assert spec_of(PRIVATE, **more).noise_contributors == 0


def test_a_sum_that_came_to_nothing_costs_as_much_as_a_round() -> None:
    budget, _ = budget_of(DISTRIBUTED)
    once = budget.account()
    budget.discarded = 2
    account = budget.account()
    assert (once["rounds"], account["rounds"]) == (1, 3)
    assert account["renyi_slope"] == pytest.approx(3 * once["renyi_slope"])
    budget.charge()
    assert budget.discarded == 0
    assert budget.account()["rounds"] == 4


@pytest.mark.parametrize("private", [PRIVATE, DISTRIBUTED, PRIVATE | ADAPTIVE, DISTRIBUTED | ADAPTIVE])
def test_a_restart_takes_the_account_and_the_norm_from_the_record(private: dict[str, object]) -> None:
    budget, mechanism = budget_of(private)
    budget.charge()
    kept = record(2, budget.account() | {"next_clip_norm": 0.75})
    again, restarted = budget_of(private)
    again.restore(kept, [record(1, {}), kept])
    assert again.account()["rounds"] == 3
    assert again.status().epsilon == kept.privacy["epsilon"]
    assert restarted.next_clip_norm == restarted.secure_noise().clip_norm == 0.75
    assert mechanism.next_clip_norm == 0.5


def test_adaptive_clipping_costs_nothing_more() -> None:
    plain, _ = budget_of(DISTRIBUTED)
    adaptive, mechanism = budget_of(DISTRIBUTED | ADAPTIVE)
    noise = mechanism.secure_noise()
    assert noise.count_noise == 4.0 and noise.noise_multiplier == pytest.approx((1 / 16 - 1 / 64) ** -0.5)
    assert adaptive.account()["epsilon"] == pytest.approx(plain.account()["epsilon"], rel=1e-4)
