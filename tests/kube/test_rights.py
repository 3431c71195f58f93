"""The operator's rights: the documented rights suffice (every test here runs with them), and permit nothing more."""

from collections.abc import Iterator

import pytest

from .cluster import ACCOUNT, Namespace, documented_rules, grant, kubectl

FORBIDDEN = [
    ("list", "secrets"),
    ("watch", "secrets"),
    ("delete", "secrets"),
    ("patch", "pods"),
    ("create", "pods/exec"),
    ("create", "serviceaccounts"),
    ("create", "roles"),
    ("create", "deployments"),
    ("create", "federatedjobs"),
    ("impersonate", "users"),
    ("create", "serviceaccounts/token"),
]


@pytest.fixture
def granted(namespace: Namespace) -> Iterator[Namespace]:
    """Yield a namespace where the operator's service account has its rights."""
    wide = grant(namespace.name)
    yield namespace
    kubectl("delete", "clusterrole,clusterrolebinding", wide)


def may(namespace: Namespace, verb: str, resource: str, where: str | None = None) -> bool:
    kind, _, sub = resource.partition("/")
    account = f"--as=system:serviceaccount:{namespace.name}:{ACCOUNT}"
    scope = ["-n", where or namespace.name]
    said = kubectl("auth", "can-i", verb, kind, f"--subresource={sub}", account, *scope, check=False).split()
    # Ignore warnings after the answer.
    assert said[:1] in (["yes"], ["no"]), said
    return said[0] == "yes"


def test_the_documentation_lists_rules() -> None:
    rules = documented_rules()
    assert {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "create", "patch"]} in rules["served"]
    assert {
        "apiGroups": [""], "resources": ["namespaces"], "verbs": ["get"], "resourceNames": ["kube-system"],
    } in rules["cluster"]  # fmt: skip
    assert not [rule for rule in (*rules["served"], *rules["cluster"]) if "*" in str(rule)]


def test_it_lacks_the_forbidden_rights(granted: Namespace) -> None:
    assert may(granted, "get", "secrets")
    assert [what for what in FORBIDDEN if may(granted, *what)] == []


def test_it_has_no_rights_in_other_namespaces(granted: Namespace) -> None:
    """Except for jobs' finalizers, because a deleted namespace loses its Role first."""
    elsewhere = [("get", "secrets"), ("create", "pods"), ("list", "pods"), ("delete", "federatedjobs")]
    assert [what for what in elsewhere if may(granted, *what, "kube-system")] == []
