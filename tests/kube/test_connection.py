"""The operator's connection to the API server: cut, silent, throttled."""

import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from .cluster import ACCOUNT, Namespace, Operator, eventually, grant, kubeconfig, kubectl, manifest
from .proxy import Proxy

PODS = {"demo-aggregator", "demo-cloud-0-0", "demo-cloud-1-0"}


@pytest.fixture
def connection(namespace: Namespace, tmp_path: Path) -> Iterator[tuple[Proxy, Operator]]:
    """Yield an operator that reaches the API server only through a proxy, and that proxy."""
    wide = grant(namespace.name)
    path = kubeconfig(namespace.name, tmp_path / "kubeconfig")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    cluster = config["clusters"][0]["cluster"]
    server = urllib.parse.urlsplit(cluster["server"])
    with Proxy(server.hostname or "", server.port or 443) as proxy:
        cluster["server"] = f"https://127.0.0.1:{proxy.port}"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        process = Operator(namespace.name, path, tmp_path / "operator.log")
        try:
            process.start()
            yield proxy, process
        finally:
            process.stop()
            print(process.log.read_text(encoding="utf-8"))
            kubectl("delete", "clusterrole,clusterrolebinding", wide)


def test_a_connection_that_is_cut_or_silent_costs_nothing(
    namespace: Namespace, connection: tuple[Proxy, Operator]
) -> None:
    proxy, operator = connection
    namespace.apply(manifest())
    eventually(lambda: namespace.running() >= PODS, "the pods run", 180)

    assert proxy.cut()
    namespace.kubectl("delete", "pod", "demo-cloud-0-0", "--wait=false")
    eventually(lambda: "demo-cloud-0-1" in namespace.running(), "the watches are back after the cut", 240)

    # The silent connection sends no error; the operator detects it after a minute without signs of life.
    assert proxy.silence()
    namespace.kubectl("delete", "pod", "demo-cloud-1-0", "--wait=false")
    eventually(lambda: "demo-cloud-1-1" in namespace.running(), "the silence is noticed", 300)

    assert namespace.running() == {"demo-aggregator", "demo-cloud-0-1", "demo-cloud-1-1"}
    assert not namespace.events("ClientFailed")
    assert operator.process is not None and operator.process.poll() is None
    eventually(operator.ready, "it is well")


def test_an_api_server_that_throttles_slows_down_only(namespace: Namespace, operator: Operator) -> None:
    """API Priority and Fairness answers 429 above the operator's share, which is minimal here."""
    name = f"throttled-{namespace.name}"
    api = eventually(_flow_control, "the API server tells its versions")
    account = {"kind": "ServiceAccount", "serviceAccount": {"name": ACCOUNT, "namespace": namespace.name}}
    limited = {("nominalConcurrencyShares" if "beta1" not in api and "beta2" not in api else
                "assuredConcurrencyShares"): 1, "limitResponse": {"type": "Reject"}}  # fmt: skip
    everything = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"], "clusterScope": True}
    level = {"apiVersion": api, "kind": "PriorityLevelConfiguration", "metadata": {"name": name},
             "spec": {"type": "Limited", "limited": limited}}  # fmt: skip
    flow = {"apiVersion": api, "kind": "FlowSchema", "metadata": {"name": name},
            "spec": {"priorityLevelConfiguration": {"name": name}, "matchingPrecedence": 50,
                     "rules": [{"subjects": [account], "resourceRules": [everything]}]}}  # fmt: skip
    kubectl("create", "-f", "-", stdin={"apiVersion": "v1", "kind": "List", "items": [level, flow]})
    try:
        jobs = [f"job-{number}" for number in range(6)]
        namespace.apply(*(manifest(job, cloud=1) for job in jobs))
        wanted = {f"{job}-cloud-0-0" for job in jobs}
        eventually(lambda: namespace.running() >= wanted, "all pods run", 400)
        print(*(line for line in operator.metrics().splitlines() if "api_requests_total{" in line), sep="\n")
        assert 'code="429"' in operator.metrics(), "it was throttled"
        assert {item["metadata"]["name"] for item in namespace.items("pod")} == wanted | {
            f"{job}-aggregator" for job in jobs
        }
        eventually(operator.ready, "it is well")
    finally:
        kubectl("delete", "flowschema,prioritylevelconfiguration", name)


def _flow_control() -> str:
    """Return the newest version of the flow control API that the server has."""
    versions = [line for line in kubectl("api-versions").split() if line.startswith("flowcontrol.apiserver.k8s.io/")]
    return max(versions, key=lambda version: ("beta" not in version, version), default="")
