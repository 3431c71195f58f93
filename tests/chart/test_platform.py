"""Settings that platform teams need in every chart: scheduling, volumes, sources of images, OpenShift."""

import datetime as dt
import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_operator.render import aggregator
from isthmus_operator.render.client import ClientPods
from isthmus_operator.render.defaults import JobDefaults
from isthmus_operator.render.defaults_file import load
from isthmus_operator.state.observed import Job

from .conftest import CHART, DIGEST, MATRIX, NAMESPACE, WITH_MONITORING, Helm, Manifest
from .test_chart import of_kind, operator_pod

OPENSHIFT = ("--api-versions", "security.openshift.io/v1")


def image_of(helm: Helm, values: Manifest) -> str:
    image: str = operator_pod(helm.template(values))["spec"]["containers"][0]["image"].rpartition(":")[0]
    return image


@pytest.mark.parametrize(
    ("values", "image"),
    [
        ({"image": {"registry": "r.example"}}, "r.example/isthmus-operator"),
        ({"image": {"registry": "r.example:5000/mirror/"}}, "r.example:5000/mirror/isthmus-operator"),
        ({"image": {"registry": "r.example", "repository": "ghcr.io/team/op"}}, "r.example/team/op"),
        ({"image": {"registry": "r.example", "repository": "team/op"}}, "r.example/team/op"),
        ({"global": {"imageRegistry": "g.example"}, "image": {"registry": "r.example"}}, "g.example/isthmus-operator"),
        ({"global": {"imageRegistry": None}, "image": {"repository": "team/op"}}, "team/op"),
        ({"global": {"imageRegistry": "g.example"}, "image": {"digest": DIGEST}}, "g.example/isthmus-operator@sha256"),
    ],
    ids=json.dumps,
)
def test_where_the_image_comes_from(helm: Helm, values: Manifest, image: str) -> None:
    assert image_of(helm, values) == image


def test_pull_secrets_of_a_parent_chart(helm: Helm) -> None:
    values = {"global": {"imagePullSecrets": ["a", {"name": "b"}]}, "imagePullSecrets": [{"name": "c"}, {"name": "a"}]}
    documents = helm.template(values)
    (test,) = of_kind(documents, "Pod")
    for spec in (operator_pod(documents)["spec"], test["spec"]):
        assert spec["imagePullSecrets"] == [{"name": "a"}, {"name": "b"}, {"name": "c"}]


def test_what_is_added_to_the_pod(helm: Helm) -> None:
    values: Manifest = {
        "hostNetwork": True,
        "extraVolumes": [{"name": "authorities", "configMap": {"name": "company-ca"}}],
        "extraVolumeMounts": [{"name": "authorities", "mountPath": "/etc/ssl/company", "readOnly": True}],
        "extraInitContainers": [{"name": "wait", "image": "registry.example/wait:1"}],
        "extraContainers": [{"name": "audit", "image": "registry.example/audit:1"}],
    }
    documents = helm.template(values)
    (deployment,) = of_kind(documents, "Deployment")
    kubernetes_validate.validate(deployment, "1.30", strict=True)
    spec = deployment["spec"]["template"]["spec"]
    # Without it, cluster names would not resolve on the node's network.
    assert (spec["hostNetwork"], spec["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert values["extraVolumes"][0] in spec["volumes"]
    assert [item["name"] for item in spec["containers"]] == ["operator", "audit"]
    assert values["extraVolumeMounts"][0] in spec["containers"][0]["volumeMounts"]
    assert spec["initContainers"] == values["extraInitContainers"]
    assert operator_pod(helm.template({**values, "dnsPolicy": "Default"}))["spec"]["dnsPolicy"] == "Default"


def test_common_annotations_are_on_every_object_and_yield_to_its_own(helm: Helm) -> None:
    values = {
        "commonAnnotations": {"owner": "platform", "example.com/tier": "common"},
        "podAnnotations": {"example.com/tier": "pod"},
        "gateway": {"enabled": True, "hosts": ["g.example"]},
        "networkPolicy": {"enabled": True},
        "rbac": {"siteSecrets": [{"namespace": "sites", "names": ["a"]}]},
        "monitoring": {"enabled": True, "bridges": {"targets": ["b.example:9090"]}},
    }
    documents = helm.template(values, *WITH_MONITORING)
    assert len(documents) > 20
    for document in documents:
        assert document["metadata"]["annotations"]["owner"] == "platform", document["metadata"]["name"]
    crds = of_kind(documents, "CustomResourceDefinition")
    assert {crd["metadata"]["annotations"]["helm.sh/resource-policy"] for crd in crds} == {"keep"}
    assert operator_pod(documents)["metadata"]["annotations"]["example.com/tier"] == "pod"


@pytest.mark.parametrize(
    ("platform", "options", "named"),
    [
        ("Auto", (), True),
        ("Auto", OPENSHIFT, False),
        ("OpenShift", (), False),
        ("Kubernetes", OPENSHIFT, True),
    ],
)
def test_on_openshift_no_pod_names_a_user(helm: Helm, platform: str, options: tuple[str, ...], named: bool) -> None:
    documents = helm.template({"platform": platform}, *options)
    (test,) = of_kind(documents, "Pod")
    for spec in (operator_pod(documents)["spec"], test["spec"]):
        context = spec["securityContext"]
        assert {key in context for key in ("runAsUser", "runAsGroup", "fsGroup")} == {named}
        assert context["runAsNonRoot"] is True


def defaults_of(documents: list[Manifest], tmp_path: Path) -> JobDefaults | None:
    """Return the job defaults that the operator reads from its ConfigMap, if there is one."""
    found = [item for item in of_kind(documents, "ConfigMap") if item["metadata"]["name"].endswith("-job-defaults")]
    flags = [item for item in operator_pod(documents)["spec"]["containers"][0]["args"] if "job-defaults" in item]
    assert len(found) == len(flags)
    if not found:
        return None
    (content,) = found[0]["data"].values()
    (tmp_path / "defaults.yaml").write_text(content)
    return load(tmp_path / "defaults.yaml", frozenset())


def test_the_operator_reads_the_defaults_of_jobs(helm: Helm, tmp_path: Path) -> None:
    assert defaults_of(helm.template({}), tmp_path) is None
    values: Manifest = MATRIX["everything"]["jobDefaults"]
    documents = helm.template({"jobDefaults": values})
    assert defaults_of(documents, tmp_path) == JobDefaults.model_validate(values)
    other = helm.template({"jobDefaults": {**values, "storageClassName": "slow"}})
    # The operator reads them only at its start, so a change must restart it.
    marks = [operator_pod(item)["metadata"]["annotations"]["isthmus.dev/job-defaults"] for item in (documents, other)]
    assert marks[0] != marks[1]
    wrong: Manifest
    for wrong in ({"pods": {}}, {"all": {"spec": {"tolerations": {}}}}, {"service": {"type": "NodePort"}}):
        result = helm.run("template", "isthmus", str(CHART), values={"jobDefaults": wrong})
        assert result.returncode != 0 and "schema" in result.stderr


def test_on_openshift_no_job_needs_nulls(helm: Helm, tmp_path: Path) -> None:
    given = defaults_of(helm.template({}, *OPENSHIFT), tmp_path)
    assert given is not None
    wanted = parse_spec({"rounds": 1, "task": {"image": "i", "command": ["c"]}, "pools": [{"name": "p", "cloud": {}}]})
    one = Job("demo", "team", "0f9a7c1e-0000-4000-8000-000000000001", 1, dt.datetime.now(dt.UTC), {})
    for pod in (
        aggregator.pod(one, wanted, "", (), given),
        ClientPods(one, wanted, wanted.pools[0], "", (), given).pod(0, 0),
    ):
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(pod["spec"]["securityContext"])
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    # The admin's value is kept.
    values = {"jobDefaults": {"all": {"spec": {"securityContext": {"runAsUser": 1000700000}}}}}
    given = defaults_of(helm.template(values, *OPENSHIFT), tmp_path)
    assert given is not None
    assert given.all.spec["securityContext"] == {"runAsUser": 1000700000, "runAsGroup": None, "fsGroup": None}


def test_excluded_namespaces_reach_the_flags_and_the_webhook(helm: Helm) -> None:
    values = {
        "scope": {"excludeNamespaces": ["team-x", "team-y"]},
        "webhook": {"namespaceSelector": {"matchLabels": {"checked": "yes"}}},
    }
    documents = helm.template(values)
    arguments = operator_pod(documents)["spec"]["containers"][0]["args"]
    assert arguments[1:3] == ["--exclude-namespace=team-x", "--exclude-namespace=team-y"]
    for kind in ("MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"):
        (configuration,) = of_kind(documents, kind)
        assert configuration["webhooks"][0]["namespaceSelector"] == {
            "matchLabels": {"checked": "yes"},
            "matchExpressions": [
                {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["team-x", "team-y"]}
            ],
        }
    scoped = {"scope": {"type": "Namespaces", "namespaces": ["a"], "excludeNamespaces": ["b"]}}
    result = helm.run("template", "isthmus", str(CHART), values=scoped)
    assert result.returncode != 0 and "schema" in result.stderr


@pytest.mark.parametrize(("kubernetes", "limited"), [("1.21.0", True), ("1.20.2", False)])
def test_the_webhook_of_a_namespaces_operator_covers_no_other_namespace(
    helm: Helm, kubernetes: str, limited: bool
) -> None:
    """With ``failurePolicy: Fail``, an operator that is down would block new jobs in all other namespaces."""
    values = {
        "scope": {"type": "Namespaces", "namespaces": ["team-a", "team-b"]},
        "sites": {"enabled": False},
        "webhook": {"failurePolicy": "Fail"},
    }
    documents = helm.template(values, "--kube-version", kubernetes)
    served = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["team-a", "team-b"]}
    for kind in ("MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"):
        (configuration,) = of_kind(documents, kind)
        (webhook,) = configuration["webhooks"]
        assert webhook.get("namespaceSelector") == ({"matchExpressions": [served]} if limited else None)
        # HPCSites are cluster-scoped and belong to another admin.
        assert webhook["rules"][0]["resources"] == ["federatedjobs"]
    everywhere = of_kind(helm.template({}), "ValidatingWebhookConfiguration")[0]["webhooks"][0]
    assert "namespaceSelector" not in everywhere
    assert everywhere["rules"][0]["resources"] == ["federatedjobs", "hpcsites"]


def test_extra_objects_are_templates(helm: Helm) -> None:
    extra: list[Any] = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-more"}},
        "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: text\n  namespace: {{ .Release.Namespace }}\n",
    ]
    made = {item["metadata"]["name"]: item for item in of_kind(helm.template({"extraObjects": extra}), "ConfigMap")}
    assert set(made) == {"isthmus-more", "text"}
    assert made["text"]["metadata"]["namespace"] == NAMESPACE


def test_monitors_are_where_and_how_prometheus_wants_them(helm: Helm) -> None:
    drop = [{"sourceLabels": ["__name__"], "regex": "python_.*", "action": "drop"}]
    wanted = {"namespace": "monitoring", "scrapeTimeout": "5s", "metricRelabelings": drop}
    each = {"serviceMonitor": wanted, "podMonitor": wanted, "bridges": {**wanted, "targets": ["b.example:9090"]}}
    documents = helm.template(
        {"monitoring": {"enabled": True, "prometheusRule": {"namespace": "monitoring"}, **each}}, *WITH_MONITORING
    )
    by_kind = {document["kind"]: document for document in documents if document["apiVersion"].startswith("monitoring.")}
    assert {document["metadata"]["namespace"] for document in by_kind.values()} == {"monitoring"}
    assert len(by_kind) == 4
    # The monitor still selects the operator's Service.
    assert by_kind["ServiceMonitor"]["spec"]["namespaceSelector"] == {"matchNames": [NAMESPACE]}
    (endpoint,) = by_kind["ServiceMonitor"]["spec"]["endpoints"]
    assert (endpoint["scrapeTimeout"], endpoint["metricRelabelings"]) == ("5s", drop)
    (pods,) = by_kind["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert (pods["scrapeTimeout"], pods["metricRelabelings"]) == ("5s", drop)
    scrape = by_kind["ScrapeConfig"]["spec"]
    assert (scrape["scrapeTimeout"], scrape["metricRelabelConfigs"]) == ("5s", drop)
