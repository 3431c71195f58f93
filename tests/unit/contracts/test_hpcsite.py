"""Who dials: the site's manifest says it, and the API server's schema agrees with the models."""

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from isthmus_contracts.crd import hpc_site_crd
from isthmus_contracts.manifest import ManifestError, parse_site_spec

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
def test_one_way_in(fields: dict[str, Any], problem: str) -> None:
    spec = {**SITE, **fields}
    schema = hpc_site_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    # As the API server sees it, which fills in defaults first.
    assert Draft202012Validator(schema).is_valid({"connection": "DialIn", **spec}) == (not problem)
    if not problem:
        parse_site_spec(spec)
        return
    with pytest.raises(ManifestError) as caught:
        parse_site_spec(spec)
    assert str(caught.value).startswith(problem)


def test_the_name_that_the_bridge_must_bear() -> None:
    named = {**SITE, "tls": {**SITE["tls"], "serverName": "bridge.example"}}
    assert parse_site_spec({**SITE, "endpoint": ENDPOINT}).bridge_name("lumi") is None
    assert parse_site_spec({**SITE, "connection": "DialOut"}).bridge_name("lumi") == "lumi.bridge.isthmus.dev"
    assert parse_site_spec({**named, "connection": "DialOut"}).bridge_name("lumi") == "bridge.example"
