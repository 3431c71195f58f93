"""The chart, rendered by real Helm: valid for every supported Kubernetes, least privilege, unknown values refused."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cryptography import x509
from jsonschema import Draft202012Validator

from .conftest import CHART, DIGEST, MATRIX, NAMESPACE, ROOT, WITH_MONITORING, Manifest

Rule = tuple[str, str, tuple[str, ...], frozenset[str]]

# All versions that kubernetes-validate knows.
KUBERNETES = tuple(f"1.{minor}" for minor in range(25, 38))


def of_kind(documents: list[Manifest], kind: str) -> list[Manifest]:
    return [document for document in documents if document["kind"] == kind]


def operator_pod(documents: list[Manifest]) -> Manifest:
    (deployment,) = of_kind(documents, "Deployment")
    pod: Manifest = deployment["spec"]["template"]
    return pod


def rules_of(role: Manifest) -> set[Rule]:
    """Return one entry for each group and resource, so that the grouping in the template does not matter."""
    return {
        (group, resource, tuple(rule.get("resourceNames", ())), frozenset(rule["verbs"]))
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def documented_rules() -> tuple[set[Rule], set[Rule]]:
    """Return the rights listed in docs/operating/operator/install.md: in served namespaces, and cluster-scoped."""
    text = (ROOT / "docs" / "operating" / "operator" / "install.md").read_text().partition("## RBAC")[2]
    tables = re.findall(r"\| API group \|.*\n\|[-|]+\|\n((?:\|.*\|\n)+)", text)
    assert len(tables) == 2, "docs/operating/operator/install.md no longer holds two tables of rights"
    served, cluster = ({_documented(row) for row in table.strip().splitlines()} for table in tables)
    return served, cluster


def _documented(row: str) -> Rule:
    group, resources, verbs = (cell.strip() for cell in row.strip("|").split("|")[:3])
    resource, *names = re.findall(r"`([^`]+)`", resources)
    group = "" if group == "core" else group.strip("`")
    return group, resource, tuple(names), frozenset(re.findall(r"[a-z]+", verbs))


@pytest.mark.parametrize("case", MATRIX)
def test_rendered_objects_are_valid_for_every_kubernetes(helm: Any, case: str) -> None:
    documents = helm.template(MATRIX[case], *WITH_MONITORING)
    names = [(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in documents]
    assert len(names) == len(set(names))
    own = [document for document in documents if document["apiVersion"].startswith("monitoring.coreos.com/")]
    for document in own:
        monitoring_schema(document).validate(document["spec"])
    # Each version takes a while: one rendering is checked with all of them, the others with the oldest and the newest.
    thorough = case == "everything" and helm.program.name == "helm"
    for version in KUBERNETES if thorough else (KUBERNETES[0], KUBERNETES[-1]):
        for document in documents:
            if document not in own:
                kubernetes_validate.validate(document, version, strict=True)


def monitoring_schema(document: Manifest) -> Draft202012Validator:
    """Return the schema of a Prometheus Operator object's spec, which permits no unknown fields."""
    for crd in yaml.safe_load_all((Path(__file__).parent / "monitoring_crds.yaml").read_text()):
        (version,) = crd["spec"]["versions"]
        if document["kind"] == crd["spec"]["names"]["kind"]:
            assert document["apiVersion"] == f"{crd['spec']['group']}/{version['name']}"
            return Draft202012Validator(_closed(version["schema"]["openAPIV3Schema"]["properties"]["spec"]))
    raise AssertionError(f"no schema for {document['kind']}")


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    return (
        closed | {"additionalProperties": False}
        if "properties" in schema and schema.get("type") == "object"
        else closed
    )


@pytest.mark.parametrize("kubernetes", ["1.20.2", "1.25.0", "1.37.0"])
def test_supported_kubernetes_versions_are_accepted(helm: Any, kubernetes: str) -> None:
    assert helm.template({}, "--kube-version", kubernetes)


def test_an_older_kubernetes_is_refused(helm: Any) -> None:
    result = helm.run("template", "isthmus", str(CHART), "--kube-version", "1.19.0")
    assert result.returncode != 0 and "1.19.0" in result.stderr


@pytest.mark.parametrize("case", MATRIX)
def test_lint_finds_nothing(helm: Any, case: str) -> None:
    result = helm.run("lint", "--strict", str(CHART), values=MATRIX[case])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[WARNING]" not in result.stdout and "[ERROR]" not in result.stdout


@pytest.mark.parametrize(
    "values",
    [
        {"replicas": 2},
        {"image": {"repo": "x"}},
        {"operator": {"worker": 3}},
        {"operator": {"workers": 0}},
        {"operator": {"logLevel": "verbose"}},
        {"fullnameOverride": "UPPER_case"},
        {"nameOverride": "-a"},
        {"scope": {"type": "Everywhere"}},
        {"scope": {"type": "Namespaces"}},
        {"scope": {"type": "Namespaces", "namespaces": ["Not A Name"]}},
        {"scope": {"type": "Cluster", "namespaces": ["a"]}},
        {"rbac": {"siteSecrets": [{"namespace": "sites"}]}},
        {"image": {"digest": "sha256:short"}},
        {"metrics": {"service": {"type": "NodePort"}}},
        {"operator": {"allowInTemplates": ["everything"]}},
        {"webhook": {"failurePolicy": "Sometimes"}},
        {"monitoring": {"enabled": "yes"}},
        {"monitoring": {"serviceMonitor": {"interval": "often"}}},
        {"monitoring": {"prometheusRule": {"disabled": ["IsthmusNoSuchAlert"]}}},
        {"monitoring": {"bridges": {"targets": ["https://login1.example:9090"]}}},
        {"networkPolicy": {"ingress": []}},
    ],
    ids=json.dumps,
)
def test_wrong_values_are_refused(helm: Any, values: Manifest) -> None:
    result = helm.run("template", "isthmus", str(CHART), values=values)
    assert result.returncode != 0 and "schema" in result.stderr


def test_labels_that_repeat_a_selectors_change_no_selector(helm: Any) -> None:
    mine = {"app.kubernetes.io/name": "mine", "app.kubernetes.io/component": "mine", "app.kubernetes.io/version": "7"}
    result = helm.run("template", "isthmus", str(CHART), values={"podLabels": mine, "commonLabels": mine})
    assert result.returncode == 0, result.stderr
    documents = [item for item in yaml.load_all(result.stdout, Loader=Unique) if item]
    (deployment,) = of_kind(documents, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert labels["app.kubernetes.io/version"] == "7"


class Unique(yaml.CSafeLoader):
    """Loader that refuses duplicate keys, as the API server does."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), keys
        return super().construct_mapping(node, deep)


def test_two_servers_cannot_share_a_port(helm: Any) -> None:
    result = helm.run("template", "isthmus", str(CHART), values={"webhook": {"port": 8080}})
    assert result.returncode != 0 and "the ports of one pod must differ" in result.stderr
    assert helm.template({"webhook": {"enabled": False, "port": 8080}})


def test_every_default_is_in_the_schema_and_every_property_has_a_default() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(properties: Manifest, defaults: Manifest, path: str) -> None:
        # A parent chart sets these two.
        assert set(properties) - ({"global", "enabled"} if path == "values" else set()) == set(defaults), path
        for name, value in defaults.items():
            # An empty default is a part of a pod template, whose fields have no defaults in the chart.
            if value != {} and "properties" in properties[name]:
                compare(properties[name]["properties"], value, f"{path}.{name}")

    compare(schema["properties"], values, "values")


def test_the_chart_carries_the_generated_crds() -> None:
    generated = {path.name: path.read_bytes() for path in (ROOT / "crds").glob("*.yaml")}
    carried = {path.name: path.read_bytes() for path in (CHART / "files" / "crds").glob("*.yaml")}
    assert generated == carried, "run `make generate`"


@pytest.mark.parametrize("keep", [True, False])
def test_crds_differ_from_the_generated_ones_in_labels_and_the_keep_annotation_only(helm: Any, keep: bool) -> None:
    rendered = {
        d["metadata"]["name"]: d for d in of_kind(helm.template({"crds": {"keep": keep}}), "CustomResourceDefinition")
    }
    generated = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "crds").glob("*.yaml"))]
    assert sorted(rendered) == sorted(crd["metadata"]["name"] for crd in generated)
    for crd in generated:
        metadata = rendered[crd["metadata"]["name"]]["metadata"]
        assert metadata.pop("labels")["app.kubernetes.io/part-of"] == "isthmus"
        assert metadata.pop("annotations", None) == ({"helm.sh/resource-policy": "keep"} if keep else None)
        assert rendered[crd["metadata"]["name"]] == crd


def test_crds_can_be_left_out(helm: Any) -> None:
    assert not of_kind(helm.template({"crds": {"enabled": False}}), "CustomResourceDefinition")


@pytest.mark.parametrize("case", MATRIX)
def test_the_operator_meets_the_restricted_pod_security_standard(helm: Any, case: str) -> None:
    pod = operator_pod(helm.template(MATRIX[case]))["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 65532
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    # The volumes are its scratch space, certificates, and the defaults for jobs.
    assert all(set(volume) <= {"name", "emptyDir", "secret", "configMap"} for volume in pod["volumes"])
    assert container["resources"]["requests"] and container["resources"]["limits"]["memory"]


def test_the_operator_runs_once_and_never_beside_another(helm: Any) -> None:
    (deployment,) = of_kind(helm.template({}), "Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for service in of_kind(helm.template({}), "Service"):
        assert service["spec"]["selector"].items() <= labels.items()
        assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]


def test_image_references(helm: Any) -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]

    def image(**values: str) -> Any:
        return operator_pod(helm.template({"image": values}))["spec"]["containers"][0]["image"]

    assert image() == f"localhost/isthmus-operator:{version}"
    assert image(repository="r.example/o", tag="7") == "r.example/o:7"
    assert image(repository="r.example/o", tag="7", digest=DIGEST) == f"r.example/o@{DIGEST}"


def test_flags_are_documented_and_follow_the_values(helm: Any) -> None:
    (container,) = operator_pod(helm.template(MATRIX["everything"]))["spec"]["containers"]
    arguments = container["args"]
    assert arguments[0] == "--all-namespaces"
    for flag in ("--cluster=prod-1", "--workers=4", "--resync=1.5", "--metrics=[::]:9102", "--health=[::]:9103"):
        assert flag in arguments
    documented = set(
        re.findall(
            r"^\| `(--[a-z-]+)", (ROOT / "docs" / "operating" / "operator" / "install.md").read_text(), re.MULTILINE
        )
    )
    assert {argument.partition("=")[0] for argument in arguments} <= documented
    scoped = operator_pod(helm.template(MATRIX["namespaces"]))["spec"]["containers"][0]["args"]
    assert scoped[:2] == ["--namespace=team-a", "--namespace=team-b"] and "--all-namespaces" not in scoped


def test_rights_in_cluster_scope_are_the_documented_ones(helm: Any) -> None:
    served, cluster = documented_rules()
    documents = helm.template({})
    granted = rules_of(
        next(d for d in of_kind(documents, "ClusterRole") if ":" not in d["metadata"]["name"].partition(":")[2])
    )
    # The served rules already include these rights, which the operator keeps when a namespace loses its Role.
    outlives = {rule for rule in cluster if rule[1] in ("federatedjobs", "federatedjobs/status")}
    assert len(outlives) == 2
    assert granted == served | (cluster - outlives)
    assert not of_kind(documents, "Role")


def test_rights_in_namespace_scope_are_the_documented_ones(helm: Any) -> None:
    served, cluster = documented_rules()
    documents = helm.template(MATRIX["namespaces"])
    operator = f"{NAMESPACE}:isthmus-operator"
    (role,) = [d for d in of_kind(documents, "ClusterRole") if d["metadata"]["name"] == operator]
    assert rules_of(role) == cluster
    roles = {(d["metadata"]["namespace"], d["metadata"]["name"]): rules_of(d) for d in of_kind(documents, "Role")}
    assert roles == {
        ("team-a", "isthmus-operator"): served,
        ("team-b", "isthmus-operator"): served,
        (NAMESPACE, "isthmus-operator-signing-root"): {
            ("", "secrets", ("isthmus-signing-root",), frozenset({"get"})),
            ("", "secrets", (), frozenset({"create"})),
        },
        ("sites", "isthmus-operator-site-secrets"): {
            ("", "secrets", ("lumi-tls", "juwels-tls"), frozenset({"get"})),
        },
    }


@pytest.mark.parametrize("case", MATRIX)
def test_bindings_name_existing_roles_and_the_operators_account(helm: Any, case: str) -> None:
    documents = helm.template(MATRIX[case])
    account = operator_pod(documents)["spec"]["serviceAccountName"]
    roles = {
        (d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"])
        for kind in ("Role", "ClusterRole")
        for d in of_kind(documents, kind)
    }
    for binding in of_kind(documents, "RoleBinding") + of_kind(documents, "ClusterRoleBinding"):
        reference = binding["roleRef"]
        assert (reference["kind"], binding["metadata"].get("namespace"), reference["name"]) in roles
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}]


def test_a_tenants_release_has_nothing_cluster_scoped(helm: Any) -> None:
    documents = helm.template(MATRIX["tenant"])
    assert {document["metadata"].get("namespace") for document in documents} <= {NAMESPACE, "team-a"}
    assert "--no-sites" in operator_pod(documents)["spec"]["containers"][0]["args"]


def test_the_webhooks_certificate_is_what_the_api_server_checks(helm: Any) -> None:
    documents = helm.template({"webhook": {"failurePolicy": "Fail"}})
    (secret,) = of_kind(documents, "Secret")
    pem = {key: base64.b64decode(value) for key, value in secret["data"].items()}
    authority = x509.load_pem_x509_certificate(pem["ca.crt"])
    leaf = x509.load_pem_x509_certificate(pem["tls.crt"])
    leaf.verify_directly_issued_by(authority)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
    for kind in ("MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"):
        (configuration,) = of_kind(documents, kind)
        (webhook,) = configuration["webhooks"]
        service = webhook["clientConfig"]["service"]
        assert f"{service['name']}.{service['namespace']}.svc" in names
        assert webhook["clientConfig"]["caBundle"] == secret["data"]["ca.crt"]
        assert (webhook["failurePolicy"], webhook["sideEffects"]) == ("Fail", "None")
        assert service["name"] in [d["metadata"]["name"] for d in of_kind(documents, "Service")]
    mounted = {"secretName": secret["metadata"]["name"], "defaultMode": 0o440}
    assert {"name": "webhook", "secret": mounted} in operator_pod(documents)["spec"]["volumes"]


def test_certificates_by_cert_manager(helm: Any) -> None:
    values = {"webhook": {"certificates": "CertManager", "issuerRef": {"name": "platform"}}}
    documents = helm.template(values)
    (certificate,) = of_kind(documents, "Certificate")
    assert certificate["spec"]["issuerRef"] == {"group": "cert-manager.io", "kind": "ClusterIssuer", "name": "platform"}
    assert not of_kind(documents, "Secret")
    (configuration,) = of_kind(documents, "ValidatingWebhookConfiguration")
    injected = configuration["metadata"]["annotations"]["cert-manager.io/inject-ca-from"]
    assert injected == f"{NAMESPACE}/{certificate['metadata']['name']}"
    assert "caBundle" not in configuration["webhooks"][0]["clientConfig"]
    result = helm.run("template", "isthmus", str(CHART), values={"webhook": {"certificates": "CertManager"}})
    assert result.returncode != 0 and "webhook.issuerRef" in result.stderr


def test_a_named_cluster_needs_no_right_to_read_its_identity(helm: Any) -> None:
    (role,) = [
        d
        for d in of_kind(helm.template({"operator": {"cluster": "c"}}), "ClusterRole")
        if d["metadata"]["name"] == f"{NAMESPACE}:isthmus-operator"
    ]
    assert not [rule for rule in rules_of(role) if rule[1] == "namespaces"]


def test_people_get_their_rights_through_the_clusters_own_roles(helm: Any) -> None:
    roles = {d["metadata"]["name"]: d for d in of_kind(helm.template({}), "ClusterRole")}
    viewer, editor = (roles[f"{NAMESPACE}:isthmus-operator:{name}"] for name in ("viewer", "editor"))
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    assert {key for key in viewer["metadata"]["labels"] if key.startswith(prefix)} == {
        prefix + name for name in ("view", "edit", "admin")
    }
    assert prefix + "view" not in editor["metadata"]["labels"]
    installer = roles[f"{NAMESPACE}:isthmus-operator:installer"]
    assert [key for key in installer["metadata"]["labels"] if key.startswith(prefix)] == [prefix + "admin"]
    assert rules_of(installer) <= documented_rules()[0]
    assert {verb for rule in viewer["rules"] for verb in rule["verbs"]} == {"get", "list", "watch"}
    # Sites belong to the platform's admin, and the status to the operator.
    assert {resource for rule in editor["rules"] for resource in rule["resources"]} == {"federatedjobs"}


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    projects = [(ROOT / name / "pyproject.toml").read_text() for name in ("contracts", "operator")]
    assert chart["version"] == chart["appVersion"]
    assert all(f'version = "{chart["version"]}"' in project for project in projects)


def test_the_network_policy_admits_the_required_ports(helm: Any) -> None:
    def ports(values: Manifest) -> set[str]:
        (policy,) = of_kind(helm.template(values), "NetworkPolicy")
        return {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}

    closed: Manifest = {"networkPolicy": {"enabled": True}}
    assert ports(closed) == {"health", "metrics", "webhook"}
    assert ports({**closed, "webhook": {"enabled": False}}) == {"health", "metrics"}
