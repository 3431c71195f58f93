"""The direction of the connection in a site's manifest: the API server's schema agrees with the models."""

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from isthmus_contracts.manifests.crd import hpc_site_crd
from isthmus_contracts.manifests.manifest import ManifestError, parse_site_spec, parse_spec

SITE: dict[str, Any] = {"tls": {"secretRef": {"name": "s", "namespace": "n"}}, "allowedNamespaces": ["*"]}
ENDPOINT = "login1.example:7444"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"endpoint": ENDPOINT}, ""),
        ({"endpoint": ENDPOINT, "connection": "DialIn"}, ""),
        ({"connection": "DialOut"}, ""),
        ({}, "spec.endpoint: is missing; without it the site's bridge must dial out (connection: DialOut)"),
        ({"connection": "DialIn"}, "spec.endpoint: is missing;"),
        ({"connection": "DialOut", "endpoint": ENDPOINT}, "spec.endpoint: goes with connection DialIn;"),
        ({"connection": "Both"}, "spec.connection: must be one of DialIn, DialOut, not 'Both'"),
    ],
    ids=["endpoint", "dial-in", "dial-out", "neither", "nowhere", "both-ways", "unknown"],
)
def test_each_site_has_one_direction(fields: dict[str, Any], problem: str) -> None:
    spec = {**SITE, **fields}
    schema = hpc_site_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    # The API server fills in defaults before it validates.
    assert Draft202012Validator(schema).is_valid({"connection": "DialIn", **spec}) == (not problem)
    if not problem:
        parse_site_spec(spec)
        return
    with pytest.raises(ManifestError) as caught:
        parse_site_spec(spec)
    assert str(caught.value).startswith(problem)


def test_the_name_that_the_bridge_must_have() -> None:
    named = {**SITE, "tls": {**SITE["tls"], "serverName": "bridge.example"}}
    assert parse_site_spec({**SITE, "endpoint": ENDPOINT}).bridge_name("lumi") is None
    assert parse_site_spec({**SITE, "connection": "DialOut"}).bridge_name("lumi") == "lumi.bridge.isthmus.dev"
    assert parse_site_spec({**named, "connection": "DialOut"}).bridge_name("lumi") == "bridge.example"


@pytest.mark.parametrize(
    ("name", "namespace", "problem"),
    [
        ("lumi.tls", "2024-team", ""),
        ("2nd", "a", ""),
        ("-x", "a", "tls.secretRef.name: '-x' is not lower-case letters, digits, hyphens and dots"),
        ("x", "a.b", "tls.secretRef.namespace: 'a.b' is not lower-case letters, digits and hyphens"),
    ],
)
def test_secrets_and_namespaces_are_named_as_kubernetes_names_them(name: str, namespace: str, problem: str) -> None:
    wanted = {**SITE, "endpoint": "b.example:7444", "tls": {"secretRef": {"name": name, "namespace": namespace}}}
    if not problem:
        reference = parse_site_spec(wanted).tls.secret_ref
        assert (reference.name, reference.namespace) == (name, namespace)
        return
    with pytest.raises(ManifestError) as raised:
        parse_site_spec(wanted)
    assert problem in str(raised.value)


@pytest.mark.parametrize("storage", ["ceph.rbd", "2nd-class", ""])
def test_storage_classes_and_sites_may_have_dots_and_begin_with_a_digit(storage: str) -> None:
    hpc = {"siteRef": {"name": "lumi.csc.fi"}, "environment": "py"}
    spec = parse_spec(
        {
            "rounds": 1,
            "task": {"image": "i", "command": ["c"]},
            "pools": [{"name": "p", "replicas": 1, "hpc": hpc}],
            "aggregator": {"checkpoint": {"storageClassName": storage}},
        }
    )
    assert spec.aggregator.checkpoint.storage_class_name == storage
    assert spec.pools[0].hpc is not None
    assert spec.pools[0].hpc.site_ref.name == "lumi.csc.fi"
