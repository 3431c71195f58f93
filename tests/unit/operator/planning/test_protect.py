"""Tests of network policies and disruption budgets of a job's pods."""

import datetime as dt
from dataclasses import replace
from typing import Any

import kubernetes_validate
import pytest

from isthmus_contracts.manifests.manifest import parse_site_spec
from isthmus_operator.planning import actions as act
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.servers.admission import review_job
from isthmus_operator.state.observed import Observed, Refusal
from tests.support.fake_cluster import NOW, UID, job, of_kind, plan, site, spec, standing

SITE = {"endpoint": "h:1", "tls": {"secretRef": {"name": "a", "namespace": "b"}}, "allowedNamespaces": ["*"]}


def made(wanted: dict[str, Any], sites: dict[str, Any] | None = None, **options: Any) -> dict[str, dict[str, Any]]:
    observed = Observed(sites={"site": site()} if sites is None else sites)
    decided = plan(job(wanted), observed, NOW, PlanOptions(network_policies=True, **options))
    return {f"{item.kind}/{item.name}": dict(item.body) for item in of_kind(decided, act.Apply)}


@pytest.mark.parametrize(
    ("expose", "cidrs", "warns"),
    [
        ({"type": "NodePort"}, ["192.0.2.0/24"], True),
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Cluster"}, ["192.0.2.0/24"], True),
        ({"type": "NodePort", "externalTrafficPolicy": "Local"}, ["192.0.2.0/24"], False),
        ({"type": "ClusterIP"}, ["192.0.2.0/24"], False),
        ({"type": "NodePort"}, ["0.0.0.0/0", "::/0"], False),
    ],
)
def test_a_narrowed_site_behind_a_service_that_masks_addresses_is_warned_of(
    expose: dict[str, str], cidrs: list[str], warns: bool
) -> None:
    wanted = {"metadata": {"name": "demo", "namespace": "team"}, "spec": spec(hpc=1, aggregator={"expose": expose})}
    answer = review_job(wanted, None, None, {"site": parse_site_spec({**SITE, "clientCIDRs": cidrs})}, frozenset())
    assert answer.allowed
    assert bool(answer.warnings) is warns
    assert all("the clientCIDRs of HPCSite site do not match; set Local" in item for item in answer.warnings)


def test_no_pod_may_connect_to_clients() -> None:
    policy = made(spec())["NetworkPolicy/demo-clients"]["spec"]
    assert policy == {
        "podSelector": {"matchLabels": {"isthmus.dev/job-uid": UID, "isthmus.dev/role": "client"}},
        "policyTypes": ["Ingress"],
        "ingress": [],
    }


def test_the_aggregator_is_reached_by_its_own_clients_and_the_operator() -> None:
    policy = made(spec(), namespace="isthmus-system")["NetworkPolicy/demo-aggregator"]["spec"]
    assert policy["podSelector"] == {"matchLabels": {"isthmus.dev/job-uid": UID, "isthmus.dev/role": "aggregator"}}
    federation, metrics = policy["ingress"]
    assert federation["ports"] == [{"protocol": "TCP", "port": 7443}]
    assert federation["from"] == [
        {"podSelector": {"matchLabels": {"isthmus.dev/job-uid": UID, "isthmus.dev/role": "client"}}},
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "isthmus-system"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/component": "operator"}},
        },
    ]
    assert metrics["ports"] == [{"protocol": "TCP", "port": 9090}]


def test_hpc_clients_come_from_where_their_site_says() -> None:
    narrow = parse_site_spec({**SITE, "clientCIDRs": ["192.0.2.0/24", "2001:db8::/32"]})
    policy = made(spec(hpc=2), {"site": narrow}, namespace="x")["NetworkPolicy/demo-aggregator"]["spec"]
    blocks = [item["ipBlock"]["cidr"] for item in policy["ingress"][0]["from"] if "ipBlock" in item]
    assert blocks == ["192.0.2.0/24", "2001:db8::/32"]
    assert parse_site_spec(SITE).client_cidrs == ["0.0.0.0/0", "::/0"]


def test_a_disruption_budget_is_made_where_the_job_asks_for_one() -> None:
    assert "PodDisruptionBudget/demo-aggregator" not in made(spec())
    objects = made(spec(aggregator={"disruptionBudget": "Protect"}))
    assert objects["PodDisruptionBudget/demo-aggregator"]["spec"]["minAvailable"] == 1


@pytest.mark.parametrize("version", ["1.25", "1.37"])
def test_kubernetes_takes_them(version: str) -> None:
    for body in made(spec(hpc=2, aggregator={"disruptionBudget": "Protect"}), namespace="x").values():
        kubernetes_validate.validate(body, version, strict=True)


def test_without_them_nothing_waits() -> None:
    decided = plan(job(spec()), Observed(sites={}), NOW, PlanOptions())
    assert not [item for item in of_kind(decided, act.Apply) if item.kind == "NetworkPolicy"]


def narrow(*cidrs: str) -> dict[str, Any]:
    return {"site": parse_site_spec({**SITE, "clientCIDRs": list(cidrs)})}


def test_another_range_of_a_sites_clients_reaches_the_policies_of_jobs_that_run() -> None:
    wanted, options = spec(hpc=2), PlanOptions(network_policies=True)
    policies = {
        key: body for key, body in made(wanted, narrow("192.0.2.0/24"), namespace="x").items() if "Policy" in key
    }
    there = standing(wanted, sites=narrow("192.0.2.0/24"))
    there = replace(
        there,
        present=there.present | set(policies),
        live=policies,
    )

    def applied(observed: Observed) -> list[str]:
        decided = plan(job(wanted), observed, NOW, replace(options, namespace="x"))
        # Nothing waits for it.
        assert of_kind(decided, act.CreatePod)
        assert not [item for item in of_kind(decided, act.Mend) if item.reason]
        return [f"{item.kind}/{item.name}" for item in of_kind(decided, act.Mend)]

    assert applied(there) == []
    assert applied(replace(there, sites=narrow("198.51.100.0/24"))) == ["NetworkPolicy/demo-aggregator"]
    # Written by an operator that stored no hash there.
    bare = {key: {**body, "metadata": {**body["metadata"], "annotations": {}}} for key, body in policies.items()}
    assert applied(replace(there, live=bare)) == ["NetworkPolicy/demo-aggregator", "NetworkPolicy/demo-clients"]
    # The deletion of a site does not shut out clients that still run there.
    assert applied(replace(there, sites={})) == []
    refusal = Refusal("no", NOW + dt.timedelta(seconds=10))
    refused = replace(there, sites=narrow("::/0"), refusals={"NetworkPolicy/demo-aggregator": refusal})
    assert applied(refused) == []
