"""Secure aggregation in the operator's plans: trust, the condition, and requests to sites."""

import datetime as dt
from dataclasses import replace
from typing import Any

import pytest

from isthmus_contracts.api.hpc_site import HpcSiteSpec
from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_contracts.pb import bridge_pb2
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.wire.parties import new_root
from isthmus_operator.controllers.site import site_status
from isthmus_operator.planning import actions as act
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.planning.status import condition
from isthmus_operator.render import client, hpc
from isthmus_operator.render.trust import TrustError, trust_of
from isthmus_operator.state.aggregator_status import view
from isthmus_operator.state.observed import FederationView, Observed
from isthmus_operator.state.parties import ClusterParty, SiteParty, site_party
from tests.support.fake_cluster import NOW, aggregator, array, job, of_kind, plan, site, spec, standing

ROOT, SITE_ROOT = new_root()[1], new_root()[1]
SECURE = spec(cloud=4, hpc=3, privacy={"secureAggregation": {}})
SITES = {"site": SiteParty("lumi", SITE_ROOT)}
OPTIONS = PlanOptions()


def test_a_job_whose_roots_are_unknown_is_not_accepted_and_waits() -> None:
    waiting = Observed(sites={"site": site()}, trust_problem="spec.pools[1].hpc.siteRef.name: no root")
    decided = plan(job(SECURE), waiting, NOW, OPTIONS)
    accepted = condition(decided.status, "Accepted") or {}
    assert (accepted["status"], accepted["reason"]) == ("False", "SigningRootMissing")
    assert accepted["message"] == "spec.pools[1].hpc.siteRef.name: no root"
    assert [(event.type, event.reason) for event in decided.events] == [("Warning", "SigningRootMissing")]
    assert decided.requeue <= 60


def test_no_keys_are_made_without_trust() -> None:
    known = replace(standing(SECURE), certificates={})
    assert "demo-cloud-tls" not in [item.secret for item in of_kind(plan(job(SECURE), known, NOW, OPTIONS),
                                                                    act.IssueCertificate)]  # fmt: skip
    trusted = replace(known, trust="{}")
    issued = of_kind(plan(job(SECURE), trusted, NOW, OPTIONS), act.IssueCertificate)
    assert {item.secret: item.signing is not None for item in issued} == {
        "demo-aggregator-tls": False,
        "demo-observer-tls": False,
        "demo-cloud-tls": True,
        "demo-lumi-tls": False,
    }


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ({}, "has no signing root"),
        ({"site": SiteParty("lumi", "")}, "has no signing root"),
        ({"site": SiteParty("", SITE_ROOT)}, "has no signing root"),
        ({"site": SiteParty("lumi", ROOT)}, "has the same signing root as this cluster"),
        ({"site": SiteParty("cluster", SITE_ROOT)}, "has the same party name 'cluster' as this cluster"),
        ({"site": SiteParty("lumi", "0" * 64)}, "signing root: "),
        ({"site": SiteParty("a b", SITE_ROOT)}, "is no name of a party"),
    ],
)
def test_roots_that_cannot_be_trusted_are_named(sites: dict[str, SiteParty], words: str) -> None:
    with pytest.raises(TrustError) as error:
        trust_of(parse_spec(SECURE), "cluster", ROOT, sites)
    assert words in str(error.value)


def test_cloud_clients_demand_the_noise_that_they_are_to_add() -> None:
    noise = {"clipNorm": "1", "noiseMultiplier": "2.5", "delta": "1e-3", "noise": "Distributed"}
    private = spec(cloud=4, hpc=3, privacy={"secureAggregation": {}, "differentialPrivacy": noise})
    assert trust_of(parse_spec(private), "cluster", ROOT, SITES).noise_multiplier == 2.5
    assert trust_of(parse_spec(SECURE), "cluster", ROOT, SITES).noise_multiplier is None


def test_two_hpcsites_of_one_site_are_one_party() -> None:
    two = spec(cloud=4, hpc=2, privacy={"secureAggregation": {}})
    two["pools"].append({"name": "gpu", "hpc": {"siteRef": {"name": "other"}, "environment": "py"}})
    trust = trust_of(parse_spec(two), "cluster", ROOT, {**SITES, "other": SITES["site"]})
    assert trust.roots == {"cluster": ROOT, "lumi": SITE_ROOT}


@pytest.mark.parametrize(
    ("stated", "least"), [({}, (1, 3)), ({"minParties": 2}, (2, 3)), ({"minParties": 2, "minClients": 5}, (2, 5))]
)
def test_cloud_clients_enforce_what_the_manifest_says(stated: dict[str, Any], least: tuple[int, int]) -> None:
    wanted = parse_spec(spec(cloud=4, hpc=3, privacy={"secureAggregation": stated}))
    trust = trust_of(wanted, "cluster", ROOT, SITES)
    assert trust.required
    assert (trust.min_parties, trust.min_clients) == least


def test_the_root_that_the_admin_entered_takes_precedence() -> None:
    body = {"status": {"signing": {"party": "lumi", "root": SITE_ROOT}}}
    assert site_party(site(), body) == SiteParty("lumi", SITE_ROOT)
    pinned: HpcSiteSpec = site().model_copy(update={"signing_root": ROOT})
    assert site_party(pinned, body) == SiteParty("lumi", ROOT)


def test_a_site_shows_both_roots() -> None:
    body: dict[str, Any] = {"metadata": {"name": "site", "generation": 1}, "spec": {}}
    answer = bridge_pb2.Site(name="lumi", signing_root=SITE_ROOT)
    shown = site_status(body, answer, NOW, ClusterParty("cluster", ROOT, b""))
    assert shown["signing"] == {
        "party": "lumi", "root": SITE_ROOT, "clusterParty": "cluster", "clusterRoot": ROOT,
    }  # fmt: skip
    assert "message" not in shown
    assert "signing" not in site_status(body, bridge_pb2.Site(name="lumi"), NOW)


@pytest.mark.parametrize(
    ("reported", "words"), [(SITE_ROOT, SITE_ROOT), ("", "no signing root")], ids=["another", "none"]
)
def test_a_root_that_differs_from_the_entered_one_is_told(reported: str, words: str) -> None:
    body: dict[str, Any] = {"metadata": {"name": "site", "generation": 1}, "spec": {"signingRoot": ROOT}}
    shown = site_status(body, bridge_pb2.Site(name="lumi", signing_root=reported), NOW)
    assert words in shown["message"] and "spec.signingRoot" in shown["message"]


def test_a_cloud_client_mounts_its_signing_files_and_the_aggregator_does_not() -> None:
    parsed = parse_spec(SECURE)
    pod = client.ClientPods(job(SECURE), parsed, parsed.pools[0], "").pod(1, 0)
    (volume,) = (item for item in pod["spec"]["volumes"] if item["name"] == "isthmus-tls")
    paths = [item["path"] for item in volume["secret"]["items"]]
    assert paths == ["ca.crt", "tls.crt", "tls.key", "signing.key", "credential.json", "trust.json"]
    plain = parse_spec(spec())
    pod = client.ClientPods(job(), plain, plain.pools[0], "").pod(1, 0)
    (volume,) = (item for item in pod["spec"]["volumes"] if item["name"] == "isthmus-tls")
    assert [item["path"] for item in volume["secret"]["items"]] == paths[:3]


def stated(privacy: dict[str, Any]) -> bridge_pb2.PoolSpec:
    parsed = parse_spec(spec(cloud=4, hpc=3, privacy=privacy))
    return hpc.pool_spec(job(), parsed, parsed.pools[1], array(), "host:1", False)


def test_a_site_learns_the_protection_and_no_keys() -> None:
    told = stated(
        {
            "secureAggregation": {"minParties": 2, "minClients": 4},
            "differentialPrivacy": {"clipNorm": "1.5", "noiseMultiplier": "2", "maxEpsilon": "9"},
        }
    ).privacy
    assert told.secure_aggregation
    assert (told.min_parties, told.min_clients, told.clip_norm, told.noise_multiplier) == (2, 4, 1.5, 2)
    assert (told.delta, told.max_epsilon, told.distributed_noise) == (1e-5, 9, False)
    assert not stated({}).HasField("privacy")
    assert not stated({"differentialPrivacy": {"clipNorm": "1", "noiseMultiplier": "2"}}).privacy.secure_aggregation


def seen(**secure: Any) -> FederationView:
    status = pb.FederationStatus(
        phase=pb.FederationStatus.TRAINING, completed_rounds=1, total_rounds=5, current_round=2
    )
    if secure:
        status.secure.CopyFrom(pb.SecureStatus(**secure))
    return view(status)


def after(status: dict[str, Any], federation: FederationView | None, now: dt.datetime = NOW) -> act.Plan:
    world = standing(SECURE, pods=(aggregator(),), federation=federation, trust="{}")
    return plan(job(SECURE, status=status), world, now, OPTIONS)


def test_the_condition_follows_the_instances() -> None:
    first = after({}, seen())
    shown = condition(first.status, "SecurelyAggregated") or {}
    assert (shown["status"], shown["reason"]) == ("False", "NoSumYet")
    assert "of 7 clients in a round at least 6 must hand in" in shown["message"]
    assert "parties: the cluster (4), site site (3)" in shown["message"]

    opened = after(dict(first.status), seen(round=1, survivors=6, dropouts=1, parties=2, clipped_ratio=0.001))
    shown = condition(opened.status, "SecurelyAggregated") or {}
    assert (shown["status"], shown["reason"]) == ("True", "SumOpened")
    assert shown["message"] == "round 1: 6 survivors, 1 dropout, 2 parties, 0.10% of the coordinates clipped"

    failed = after(dict(opened.status), seen(round=2, failed=1, message="4 survivors are fewer than\nthe threshold, 5"))
    shown = condition(failed.status, "SecurelyAggregated") or {}
    assert (shown["status"], shown["reason"]) == ("False", "InstanceFailed")
    assert shown["message"] == "round 2 is done again: 4 survivors are fewer than the threshold, 5"
    assert ("Warning", "InstanceFailed") in [(event.type, event.reason) for event in failed.events]

    # An aggregator that does not answer changes nothing.
    silent = after(dict(failed.status), None)
    assert condition(silent.status, "SecurelyAggregated") == shown


def test_a_job_without_it_has_no_such_condition() -> None:
    plain = plan(job(), standing(pods=(aggregator(),), federation=seen()), NOW, OPTIONS)
    assert condition(plain.status, "SecurelyAggregated") is None
