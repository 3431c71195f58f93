"""An operator of one namespace, installed by that namespace's admin with exactly the chart's rights."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from .cluster import ACCOUNT, ROOT, Namespace, Operator, eventually, kubeconfig, kubectl, manifest, until_granted

CHART = ROOT / "charts" / "isthmus"


@pytest.fixture
def tenant(namespace: Namespace) -> Iterator[str]:
    """Yield a user with the cluster role `admin` in the namespace.

    The platform's admin has installed the CRDs and the chart's roles for users.
    """
    user = f"tenant-{namespace.name}"
    rendered = subprocess.run(
        ["helm", "template", "isthmus", CHART, "-n", namespace.name, "--show-only", "templates/user-roles.yaml"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    roles = [item for item in yaml.safe_load_all(rendered) if item]
    kubectl("apply", "-f", "-", stdin={"apiVersion": "v1", "kind": "List", "items": roles})
    namespace.kubectl("create", "rolebinding", "tenant", "--clusterrole=admin", f"--user={user}")

    def aggregated() -> bool:
        # A controller aggregates the rules into the cluster roles.
        said = namespace.kubectl("auth", "can-i", "update", "federatedjobs.isthmus.dev", "--subresource=finalizers",
                                 f"--as={user}", check=False)  # fmt: skip
        return said.strip().endswith("yes")

    eventually(aggregated, "the roles are aggregated")
    yield user
    kubectl("delete", "clusterrole", *(item["metadata"]["name"] for item in roles))


def test_a_namespaces_admin_installs_an_operator_of_their_own(
    namespace: Namespace, tenant: str, tmp_path: Path
) -> None:
    values = {
        "scope": {"type": "Namespaces", "namespaces": [namespace.name]},
        "crds": {"enabled": False},
        "rbac": {"aggregate": False},
        "sites": {"enabled": False},
        "webhook": {"enabled": False},
    }
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    install = ["helm", "install", "isthmus", CHART, "-n", namespace.name, "--kube-as-user", tenant, "--values",
               tmp_path / "values.yaml"]  # fmt: skip
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The release contains nothing that the tenant may not create.
    said = kubectl("auth", "can-i", "create", "clusterroles", f"--as={tenant}", check=False)
    assert said.split()[0] == "no"
    # Use the release's own account and the flags of its Deployment; only the image is replaced by this checkout.
    deployment = json.loads(namespace.kubectl("get", "deployment", "isthmus-operator", "-o", "json"))
    arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "--no-sites" in arguments
    namespace.kubectl("scale", "deployment", "isthmus-operator", "--replicas=0")
    eventually(lambda: not namespace.items("pod", ""), "the release's own operator is gone")
    until_granted(namespace.name, wide=False)
    operator = Operator(namespace.name, kubeconfig(namespace.name, tmp_path / "kubeconfig"), tmp_path / "operator.log")
    try:
        operator.start("--no-sites")
        job = {"apiVersion": "v1", "kind": "List", "items": [manifest()]}
        namespace.kubectl("apply", "-f", "-", f"--as={tenant}", stdin=job)
        eventually(lambda: len(namespace.running()) == 3, "the job runs", 180)
        eventually(lambda: namespace.events("Valid"), "an event says so")
        namespace.kubectl("delete", "fj", "demo", f"--as={tenant}", "--timeout=120s")
        namespace.until_bare()
        refused = [line for line in operator.log.read_text().splitlines() if "forbidden" in line.lower()]
        assert not refused
    finally:
        operator.stop()
        print(operator.log.read_text(encoding="utf-8"))
    account = f"--as=system:serviceaccount:{namespace.name}:{ACCOUNT}"
    for verb, resource, where in (
        ("get", "secrets", "kube-system"), ("list", "secrets", namespace.name), ("list", "hpcsites", namespace.name),
        ("get", "nodes", namespace.name), ("create", "roles", namespace.name), ("list", "pods", "default"),
    ):  # fmt: skip
        said = kubectl("auth", "can-i", verb, resource, "-n", where, account, check=False)
        assert "yes" not in said.split(), (verb, resource, where)
