"""Who may reach a job's pods, and what a drain may do."""

from typing import Any

import kubernetes_validate
import pytest

from isthmus_contracts.manifest import parse_site_spec
from isthmus_operator import actions as act
from isthmus_operator.draft import Limits
from isthmus_operator.observed import Observed
from isthmus_operator.plan import plan

from .world import NOW, UID, job, of_kind, site, spec

SITE = {"endpoint": "h:1", "tls": {"secretRef": {"name": "a", "namespace": "b"}}, "allowedNamespaces": ["*"]}


def made(wanted: dict[str, Any], sites: dict[str, Any] | None = None, **limits: Any) -> dict[str, dict[str, Any]]:
    observed = Observed(sites={"site": site()} if sites is None else sites)
    decided = plan(job(wanted), observed, NOW, Limits(network_policies=True, **limits))
    return {f"{item.kind}/{item.name}": dict(item.body) for item in of_kind(decided, act.Apply)}


def test_clients_are_reached_by_nobody() -> None:
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
    decided = plan(job(spec()), Observed(sites={}), NOW, Limits())
    assert not [item for item in of_kind(decided, act.Apply) if item.kind == "NetworkPolicy"]
