"""Certificates in Secrets: made once, remade in time."""

import datetime as dt

from cryptography import x509

from isthmus_contracts.manifest import parse_spec
from isthmus_contracts.pki import Authority, expiry
from isthmus_operator import certificates
from isthmus_operator.actions import IssueCertificate
from isthmus_operator.plan_base import certificate_days

from .world import job, spec

NOW = dt.datetime.now(dt.UTC)
WANTED = IssueCertificate("demo-cloud-tls", "demo cloud", 365, uris=("isthmus://job/x/pool/cloud",))


def authority(days: int = 730) -> Authority:
    made = certificates.load_authority(certificates.authority_secret(job(), "demo-ca", days, NOW))
    assert made is not None
    return made


def test_a_secret_survives_the_api_server() -> None:
    ca = authority()
    secret = certificates.leaf_secret(job(), ca, WANTED, NOW)
    assert secret["type"] == "kubernetes.io/tls"
    credentials = certificates.load_credentials(secret)
    assert certificates.serves(credentials, ca, NOW)


def test_it_is_remade_a_month_before_it_ends() -> None:
    ca = authority()
    credentials = certificates.load_credentials(certificates.leaf_secret(job(), ca, WANTED, NOW))
    assert credentials is not None
    end = expiry(credentials.certificate)
    assert certificates.serves(credentials, ca, end - dt.timedelta(days=31))
    assert not certificates.serves(credentials, ca, end - dt.timedelta(days=29))


def test_a_certificate_of_another_authority_does_not_serve() -> None:
    credentials = certificates.load_credentials(certificates.leaf_secret(job(), authority(), WANTED, NOW))
    assert not certificates.serves(credentials, authority(), NOW)


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
        # Pods that bear the fingerprint of the first are not replaced.
        assert certificates.fingerprint(secret, renewed) == name
        assert abs(renewed.expires - later - dt.timedelta(days=700)) < dt.timedelta(seconds=2)
        first, later = renewed, later + dt.timedelta(days=680)
    # What was signed before is signed anew, with the CA's newest certificate beside it.
    leaf = certificates.load_credentials(certificates.leaf_secret(job(), authority(), WANTED, NOW))
    assert not certificates.serves(leaf, first, later)


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


def test_what_cannot_be_read_is_made_anew() -> None:
    assert certificates.load_authority(None) is None
    assert certificates.load_authority({"data": {"tls.crt": "!!", "tls.key": "eA=="}}) is None
    assert certificates.load_authority({"data": {"tls.crt": "eA==", "tls.key": "eA=="}}) is None
    assert certificates.load_credentials({"data": {"tls.crt": "eA=="}}) is None


def test_certificates_outlive_the_deadline() -> None:
    assert certificate_days(parse_spec(spec())) == 365
    assert certificate_days(parse_spec(spec(activeDeadlineSeconds=1000 * 86400))) == 1060
