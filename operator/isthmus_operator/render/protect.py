"""A job's NetworkPolicies and the aggregator's PodDisruptionBudget."""

from collections.abc import Iterable
from typing import Any

from isthmus_contracts import identities as ids

from .. import names
from ..state.observed import Job
from .pod import owned

# Set by Kubernetes on every namespace since 1.21.
_NAMESPACE_LABEL = "kubernetes.io/metadata.name"
_OPERATOR = {"app.kubernetes.io/component": "operator"}


def aggregator_policy(job: Job, operator_namespace: str, outside: Iterable[str]) -> dict[str, Any]:
    """Render the policy that lets the job's clients, the operator and HPC clients reach the aggregator.

    ``outside``: CIDRs of HPC clients. ``operator_namespace``: empty if the operator runs outside the cluster; then
    connections from anywhere are allowed.
    """
    clients = {"podSelector": {"matchLabels": _labels(job, names.ROLE_CLIENT)}}
    peers: list[dict[str, Any]] = [clients, *({"ipBlock": {"cidr": cidr}} for cidr in sorted(set(outside)))]
    port = [{"protocol": "TCP", "port": ids.AGGREGATOR_PORT}]
    rules: list[dict[str, Any]] = [{"from": peers, "ports": port}]
    if operator_namespace:
        home = {"matchLabels": {_NAMESPACE_LABEL: operator_namespace}}
        operator = {"namespaceSelector": home, "podSelector": {"matchLabels": _OPERATOR}}
        rules[0]["from"] = [*peers, operator]
    else:
        rules = [{"ports": port}]
    # Prometheus may run in any namespace; the metrics name no clients and contain no secrets.
    rules.append({"from": [{"namespaceSelector": {}}], "ports": [{"protocol": "TCP", "port": ids.METRICS_PORT}]})
    return _policy(job, names.aggregator(job.name), names.ROLE_AGGREGATOR, rules)


def clients_policy(job: Job) -> dict[str, Any]:
    """Render the policy that denies all connections to clients."""
    return _policy(job, names.clients_policy(job.name), names.ROLE_CLIENT, [])


def disruption_budget(job: Job) -> dict[str, Any]:
    """Render the budget that keeps node drains from evicting the aggregator."""
    selector = {"matchLabels": _labels(job, names.ROLE_AGGREGATOR)}
    content = {"spec": {"minAvailable": 1, "selector": selector}}
    return owned(job, "PodDisruptionBudget", names.aggregator(job.name), content, "policy/v1")


def _policy(job: Job, name: str, role: str, rules: list[dict[str, Any]]) -> dict[str, Any]:
    spec = {"podSelector": {"matchLabels": _labels(job, role)}, "policyTypes": ["Ingress"], "ingress": rules}
    return owned(job, "NetworkPolicy", name, {"spec": spec}, "networking.k8s.io/v1")


def _labels(job: Job, role: str) -> dict[str, str]:
    return {ids.LABEL_JOB_UID: job.uid, ids.LABEL_ROLE: role}
