"""Tests of certificates in Secrets: creation, and renewal in time."""

import datetime as dt
import json
from dataclasses import replace

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from isthmus_contracts.identities import client_files
from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_contracts.wire.pki import Authority, expiry
from isthmus_operator.effects import certificates
from isthmus_operator.planning import desired
from isthmus_operator.planning.actions import IssueCertificate
from isthmus_operator.planning.desired import certificate_days
from tests.support.fake_cluster import job, spec

HPC_POOL = {"name": "lumi", "replicas": 2, "hpc": {"siteRef": {"name": "site"}, "environment": "e"}}
NOW = dt.datetime.now(dt.UTC)
WANTED = IssueCertificate("demo-hpc-tls", "demo hpc", 365, uris=("isthmus://job/x/pool/hpc",))


def authority(days: int = 730) -> Authority:
    made = certificates.load_authority(certificates.authority_secret(job(), "demo-ca", days, NOW))
    assert made is not None
    return made


def test_a_secret_survives_the_api_server() -> None:
    ca = authority()
    secret = certificates.leaf_secret(job(), ca, WANTED, NOW)
    assert secret["type"] == "kubernetes.io/tls"
    credentials = certificates.load_credentials(secret)
    assert certificates.is_valid(credentials, ca, NOW)


def test_a_secret_of_a_full_pool_has_a_certificate_for_each_client() -> None:
    wanted = parse_spec(spec(pools=[{"name": "cloud", "replicas": 2, "cloud": {"maxReplicas": 1000}}, HPC_POOL]))
    clients = [item for item in desired.certificates(job(), wanted) if item.clients]
    assert [item.secret for item in clients] == ["demo-cloud-tls", "demo-cloud-tls-1", "demo-cloud-tls-2"]
    assert [index for item in clients for index, _ in item.clients] == list(range(1000)), "also those to come"
    assert clients[2].clients[-1][1].endswith("/pool/cloud/client/999")
    ca = authority()
    secret = certificates.leaf_secret(job(), ca, clients[0], NOW)
    assert secret["type"] == "Opaque"
    # The limit of a Secret and of an object in etcd.
    assert sum(map(len, certificates.decoded(secret).values())) < 1 << 20
    assert len(json.dumps(secret)) < 1.2e6
    assert certificates.is_current(secret, clients[0], ca, NOW)
    data = certificates.decoded(secret)
    uris = []
    for index in (0, 399):
        crt, key = client_files(index)
        found = x509.load_pem_x509_certificate(data[crt])
        assert load_pem_private_key(data[key], None).public_key() == found.public_key()
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris += names.get_values_for_type(x509.UniformResourceIdentifier)
    assert uris == [clients[0].clients[0][1], clients[0].clients[399][1]]


def test_a_secret_that_lacks_a_client_is_outdated() -> None:
    few = replace(WANTED, uris=(), clients=((0, "isthmus://job/x/pool/cloud/client/0"),))
    more = replace(few, clients=(*few.clients, (1, "isthmus://job/x/pool/cloud/client/1")))
    ca = authority()
    secret = certificates.leaf_secret(job(), ca, few, NOW)
    assert certificates.is_current(secret, few, ca, NOW)
    assert not certificates.is_current(secret, more, ca, NOW)
    assert not certificates.is_current(secret, WANTED, ca, NOW)
    assert not certificates.is_current(None, few, ca, NOW)
    assert not certificates.is_current(secret, few, authority(), NOW)
    assert not certificates.is_current(secret, few, ca, NOW + dt.timedelta(days=336))
    renewed = certificates.leaf_secret(job(), ca, few, NOW)
    assert certificates.version(secret) == certificates.version(secret) != certificates.version(renewed)


def test_it_is_remade_a_month_before_it_ends() -> None:
    ca = authority()
    credentials = certificates.load_credentials(certificates.leaf_secret(job(), ca, WANTED, NOW))
    assert credentials is not None
    end = expiry(credentials.certificate)
    assert certificates.is_valid(credentials, ca, end - dt.timedelta(days=31))
    assert not certificates.is_valid(credentials, ca, end - dt.timedelta(days=29))


def test_a_certificate_of_another_authority_does_not_serve() -> None:
    credentials = certificates.load_credentials(certificates.leaf_secret(job(), authority(), WANTED, NOW))
    assert not certificates.is_valid(credentials, authority(), NOW)


def test_a_renewed_authority_is_the_same_one_for_longer() -> None:
    secret = certificates.authority_secret(job(), "demo-ca", 40, NOW)
    first = certificates.load_authority(secret)
    assert first is not None
    name = certificates.fingerprint(secret, first)
    assert not certificates.ends_soon(first, NOW)
    later = NOW + dt.timedelta(days=15)
    assert certificates.ends_soon(first, later)
    for _ in range(2):
        secret = certificates.renewed_authority_secret(job(), "demo-ca", first, name, 700, later)
        renewed = certificates.load_authority(secret)
        assert renewed is not None
        # Pods with the first fingerprint are not replaced.
        assert certificates.fingerprint(secret, renewed) == name
        assert abs(renewed.expires - later - dt.timedelta(days=700)) < dt.timedelta(seconds=2)
        first, later = renewed, later + dt.timedelta(days=680)
    # Earlier certificates are issued again, together with the CA's newest certificate.
    leaf = certificates.load_credentials(certificates.leaf_secret(job(), authority(), WANTED, NOW))
    assert not certificates.is_valid(leaf, first, later)


def test_an_annotation_of_another_authority_says_nothing() -> None:
    secret = certificates.authority_secret(job(), "demo-ca", 40, NOW)
    secret["metadata"]["annotations"] = {"isthmus.dev/authority": f"0123456789abcdef.{'f' * 16}"}
    found = certificates.load_authority(secret)
    assert found is not None
    assert certificates.fingerprint(secret, found) == certificates.digest(found.certificate)


def test_clocks_may_be_behind_by_hours() -> None:
    ca = authority()
    leaf = certificates.load_credentials(certificates.leaf_secret(job(), ca, WANTED, NOW))
    assert leaf is not None
    for text in (ca.certificate, leaf.certificate):
        assert x509.load_pem_x509_certificate(text).not_valid_before_utc <= NOW - dt.timedelta(hours=14)


def test_unreadable_certificates_are_not_loaded() -> None:
    assert certificates.load_authority(None) is None
    assert certificates.load_authority({"data": {"tls.crt": "!!", "tls.key": "eA=="}}) is None
    assert certificates.load_authority({"data": {"tls.crt": "eA==", "tls.key": "eA=="}}) is None
    assert certificates.load_credentials({"data": {"tls.crt": "eA=="}}) is None


def test_certificates_outlive_the_deadline() -> None:
    assert certificate_days(parse_spec(spec())) == 365
    assert certificate_days(parse_spec(spec(activeDeadlineSeconds=1000 * 86400))) == 1060
