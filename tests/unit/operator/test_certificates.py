"""Certificates in Secrets: made once, remade in time."""

import datetime as dt

from isthmus_contracts.manifest import parse_spec
from isthmus_contracts.pki import Authority, expiry
from isthmus_operator import certificates
from isthmus_operator.actions import IssueCertificate
from isthmus_operator.plan_base import certificate_days

from .world import job, spec

NOW = dt.datetime.now(dt.UTC)
WANTED = IssueCertificate("demo-cloud-tls", "demo cloud", 365, uris=("isthmus://job/x/pool/cloud",))


def authority(days: int = 730) -> Authority:
    made = certificates.load_authority(certificates.authority_secret(job(), "demo-ca", days), NOW)
    assert made is not None
    return made


def test_a_secret_survives_the_api_server() -> None:
    ca = authority()
    secret = certificates.leaf_secret(job(), ca, WANTED)
    assert secret["type"] == "kubernetes.io/tls"
    credentials = certificates.load_credentials(secret)
    assert certificates.serves(credentials, ca, NOW)


def test_it_is_remade_a_month_before_it_ends() -> None:
    ca = authority()
    credentials = certificates.load_credentials(certificates.leaf_secret(job(), ca, WANTED))
    assert credentials is not None
    end = expiry(credentials.certificate)
    assert certificates.serves(credentials, ca, end - dt.timedelta(days=31))
    assert not certificates.serves(credentials, ca, end - dt.timedelta(days=29))


def test_a_certificate_of_another_authority_does_not_serve() -> None:
    credentials = certificates.load_credentials(certificates.leaf_secret(job(), authority(), WANTED))
    assert not certificates.serves(credentials, authority(), NOW)


def test_what_cannot_be_read_is_made_anew() -> None:
    assert certificates.load_authority(None, NOW) is None
    assert certificates.load_authority({"data": {"tls.crt": "!!", "tls.key": "eA=="}}, NOW) is None
    assert certificates.load_authority({"data": {"tls.crt": "eA==", "tls.key": "eA=="}}, NOW) is None
    assert certificates.load_credentials({"data": {"tls.crt": "eA=="}}) is None


def test_certificates_outlive_the_deadline() -> None:
    assert certificate_days(parse_spec(spec())) == 365
    assert certificate_days(parse_spec(spec(activeDeadlineSeconds=1000 * 86400))) == 1060
