"""Any values that the schema accepts are rendered as valid objects, or refused with a message of the chart.

The examples are the same in every run. ``ISTHMUS_CHART_EXAMPLES=200`` draws that number of new ones.
"""

import os
import re
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import CHART, NAMESPACE, WITH_MONITORING, Helm, Manifest
from .random_values import ODD_WORDS, VALUES
from .test_chart import Unique, monitoring_schema, of_kind, operator_pod

NEW_EXAMPLES = int(os.environ.get("ISTHMUS_CHART_EXAMPLES", "0"))
OPENSHIFT = ["--api-versions", "security.openshift.io/v1"]
# The chart's own messages of refusal, and that of the schema.
REFUSALS = (
    "the ports of one pod must differ",
    "gateway.enabled is for HPC sites, and sites.enabled is false",
    "gateway.hosts must list the names",
    "is neither a host name nor an IP address",
    "error parsing ip",  # Helm's words for an IPv6 address such as 1:2
    "must name the Secret with the gateway's certificate",
    "issuerRef.name must name cert-manager's issuer",
    "values don't meet the specifications of the schema",
)
LABEL = re.compile(r"([a-z0-9]([-a-z0-9]*[a-z0-9])?)")
NAME = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?)")
SERVICE = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
# A release's name may contain dots, and be 53 characters long.
RELEASES = st.sampled_from(["isthmus", "123", "true", "null", "1e3", "team.a", "9" * 53, "a" * 53, "0.isthmus", "a-1"])
NAMESPACES = st.sampled_from([NAMESPACE, "123", "true", "1e3", "0x1f", "a" * 63])


def rendered(helm: Helm, values: Manifest, name: str, namespace: str, *options: str) -> list[Manifest] | None:
    """Return the objects, or None if the chart refuses the values."""
    result = helm.run("template", name, str(CHART), "--namespace", namespace, *options, values=values)
    if result.returncode:
        assert any(words in result.stderr for words in REFUSALS), result.stderr
        return None
    return [item for item in yaml.load_all(result.stdout, Loader=Unique) if item]


def check(document: Manifest) -> None:
    """Check types with Kubernetes' and the Prometheus Operator's schemas, and names with the API server's rules."""
    kind, metadata = document["kind"], document["metadata"]
    texts = [metadata["name"], *metadata.get("labels", {}).items(), *metadata.get("annotations", {}).items()]
    assert all(isinstance(part, str) for text in texts for part in ([text] if isinstance(text, str) else text)), texts
    namespace = metadata.get("namespace", "a")
    assert isinstance(namespace, str) and LABEL.fullmatch(namespace), namespace
    if document["apiVersion"].startswith("monitoring."):
        monitoring_schema(document).validate(document["spec"])
    elif not document["apiVersion"].startswith("cert-manager."):
        kubernetes_validate.validate(document, "1.31", strict=True)
    name = metadata["name"]
    if kind == "Service":
        assert SERVICE.fullmatch(name) and len(name) <= 63, name
    elif not document["apiVersion"].startswith("rbac."):
        assert NAME.fullmatch(name) and len(name) <= 253, name


@settings(max_examples=NEW_EXAMPLES or 12, derandomize=not NEW_EXAMPLES, suppress_health_check=list(HealthCheck))
@given(values=VALUES, name=RELEASES, namespace=NAMESPACES, openshift=st.booleans())
def test_random_values_render_valid_objects(
    helm: Any, values: Manifest, name: str, namespace: str, openshift: bool
) -> None:
    # The objects' own account and class names may be odd strings that the API server refuses; they must remain strings.
    options = WITH_MONITORING + (OPENSHIFT if openshift else [])
    documents = rendered(helm, values, name, namespace, *options)
    for document in documents or ():
        if document["kind"] != "CustomResourceDefinition" and document["metadata"]["name"] not in ODD_WORDS:
            check(document)
    # Helm's linter refuses the odd names, too.
    if documents is not None and all(NAME.fullmatch(document["metadata"]["name"]) for document in documents):
        lint = helm.run("lint", "--strict", str(CHART), "--namespace", namespace, values=values)
        assert lint.returncode == 0, lint.stdout + lint.stderr


@pytest.mark.parametrize(
    "word", ["123", "1e3", "true", "null", " x ", "a: b", "# a", "- a", "{a", "'a", '"a', "*a", "!a", "a\nb"]
)
def test_an_odd_string_stays_a_string(helm: Any, word: str) -> None:
    values = {
        "operator": {"cluster": word, "extraArgs": [word]},
        "priorityClassName": word,
        "runtimeClassName": word,
        "serviceAccount": {"create": False, "name": word},
        "imagePullSecrets": [{"name": word}],
        "image": {"tag": word},
        "commonAnnotations": {"example.com/a": word},
        "gateway": {"enabled": True, "hosts": ["a.example"], "service": {"loadBalancerClass": word}},
        "webhook": {"certificates": "CertManager", "issuerRef": {"name": word, "kind": word, "group": word}},
        "crds": {"enabled": False},
    }
    documents = rendered(helm, values, "isthmus", NAMESPACE)
    assert documents is not None
    pod = operator_pod(documents)
    spec = pod["spec"]
    assert spec["priorityClassName"] == spec["runtimeClassName"] == spec["serviceAccountName"] == word
    assert spec["imagePullSecrets"] == [{"name": word}]
    (container,) = spec["containers"]
    assert container["image"].endswith(f":{word}")
    assert f"--cluster={word}" in container["args"] and word in container["args"]
    assert pod["metadata"]["annotations"]["example.com/a"] == word
    (certificate,) = of_kind(documents, "Certificate")
    assert certificate["spec"]["issuerRef"] == {"group": word, "kind": word, "name": word}
    (gateway,) = [item for item in of_kind(documents, "Service") if item["spec"]["type"] == "LoadBalancer"]
    assert gateway["spec"]["loadBalancerClass"] == word
    (binding,) = of_kind(documents, "ClusterRoleBinding")
    assert binding["subjects"][0]["name"] == word


def test_large_numbers_are_written_as_integers(helm: Any) -> None:
    """Helm reads numbers in values as floats, which Go would print as 1e+06."""
    values = {
        "operator": {"workers": 1000000, "apiConcurrency": 2000000, "siteGiveUpSeconds": 86400000},
        "terminationGracePeriodSeconds": 1000000,
    }
    documents = rendered(helm, values, "isthmus", NAMESPACE)
    assert documents is not None
    spec = operator_pod(documents)["spec"]
    assert spec["terminationGracePeriodSeconds"] == 1000000
    wanted = {"--workers=1000000", "--api-concurrency=2000000", "--site-give-up=86400000"}
    assert wanted <= set(spec["containers"][0]["args"])
