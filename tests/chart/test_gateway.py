"""The gateway for sites that dial out: its certificate, its Service, and the values that it requires."""

import base64
import ipaddress
import json
from typing import Any

import pytest
from cryptography import x509

from .conftest import CHART, MATRIX, Manifest

NAME = "isthmus-operator-gateway"


def one(documents: list[Manifest], kind: str, name: str = NAME) -> Manifest:
    (found,) = (item for item in documents if item["kind"] == kind and item["metadata"]["name"] == name)
    return found


def rendered(helm: Any, **gateway: Any) -> list[Manifest]:
    documents: list[Manifest] = helm.template({"gateway": {"enabled": True, **gateway}})
    return documents


def pod(documents: list[Manifest]) -> Manifest:
    (deployment,) = (item for item in documents if item["kind"] == "Deployment")
    spec: Manifest = deployment["spec"]["template"]["spec"]
    return spec


def test_its_certificate_is_for_the_hosts_that_sites_dial(helm: Any) -> None:
    documents = rendered(helm, hosts=["gateway.example", "192.0.2.7", "2001:db8::1"])
    pem = {name: base64.b64decode(value) for name, value in one(documents, "Secret")["data"].items()}
    leaf = x509.load_pem_x509_certificate(pem["tls.crt"])
    leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(pem["ca.crt"]))
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gateway.example"]
    addresses = [ipaddress.ip_address("192.0.2.7"), ipaddress.ip_address("2001:db8::1")]
    assert names.get_values_for_type(x509.IPAddress) == addresses
    kept = one(documents, "Secret", f"{NAME}-ca")["data"]
    assert base64.b64decode(kept["tls.crt"]) == pem["ca.crt"]
    mounted = [volume["secret"]["secretName"] for volume in pod(documents)["volumes"] if "secret" in volume]
    assert NAME in mounted and f"{NAME}-ca" not in mounted, "the authority's key stays out of the pod"
    assert "--gateway=[::]:7446" in pod(documents)["containers"][0]["args"]


def test_its_certificate_by_cert_manager_and_from_a_secret(helm: Any) -> None:
    issuer = {"name": "platform"}
    documents = rendered(helm, certificates="CertManager", hosts=["gateway.example", "192.0.2.7"], issuerRef=issuer)
    certificate = one(documents, "Certificate")["spec"]
    assert (certificate["dnsNames"], certificate["ipAddresses"]) == (["gateway.example"], ["192.0.2.7"])
    assert certificate["secretName"] == NAME
    documents = rendered(helm, certificates="Secret", secretName="public-tls")
    assert not [item for item in documents if item["kind"] == "Secret" and "gateway" in item["metadata"]["name"]]
    assert {"secretName": "public-tls", "defaultMode": 0o440} in [v.get("secret") for v in pod(documents)["volumes"]]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"gateway": {"enabled": True}}, "gateway.hosts must list"),
        ({"gateway": {"enabled": True, "certificates": "Secret"}}, "gateway.secretName must name"),
        ({"gateway": {"enabled": True, "certificates": "CertManager", "hosts": ["g"]}}, "gateway.issuerRef.name"),
        ({"gateway": {"enabled": True, "hosts": ["g"]}, "sites": {"enabled": False}}, "sites.enabled is false"),
        ({"gateway": {"enabled": True, "hosts": ["a b"]}}, "schema"),
        ({"gateway": {"host": "g"}}, "schema"),
        ({"gateway": {"service": {"type": "ExternalName"}}}, "schema"),
    ],
    ids=json.dumps,
)
def test_unusable_values_are_refused(helm: Any, values: Manifest, says: str) -> None:
    result = helm.run("template", "isthmus", str(CHART), values=values)
    assert result.returncode != 0 and says in result.stderr


def test_who_may_dial_it(helm: Any) -> None:
    documents = helm.template(MATRIX["everything"])
    service = one(documents, "Service", "federation-operator-gateway")["spec"]
    assert service["type"] == "LoadBalancer" and service["loadBalancerSourceRanges"] == ["198.51.100.0/24"]
    (policy,) = (item for item in documents if item["kind"] == "NetworkPolicy")
    (rule,) = (rule for rule in policy["spec"]["ingress"] if rule["ports"][0]["port"] == "gateway")
    assert rule["from"] == [{"ipBlock": {"cidr": "198.51.100.0/24"}}]
    assert not [item for item in helm.template({}) if "gateway" in item["metadata"]["name"]]


def test_numbers_that_are_no_addresses_are_host_names(helm: Any) -> None:
    documents = rendered(helm, hosts=["0", "300.1.2.3", "255.0.2.1"])
    leaf = x509.load_pem_x509_certificate(base64.b64decode(one(documents, "Secret")["data"]["tls.crt"]))
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["0", "300.1.2.3"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("255.0.2.1")]


def test_a_host_with_a_colon_that_is_no_address_is_refused(helm: Any) -> None:
    values = {"gateway": {"enabled": True, "hosts": ["gateway.example:7443"]}}
    refused = helm.run("template", "isthmus", str(CHART), values=values)
    assert refused.returncode
    assert "gateway.hosts: gateway.example:7443 is neither a host name nor an IP address" in refused.stderr
