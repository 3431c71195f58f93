"""The certificates in a job's Secrets: whether they still do, and how they are made."""

import base64
import binascii
import datetime as dt
import hashlib
from collections.abc import Mapping
from typing import Any

from isthmus_contracts import identities as ids
from isthmus_contracts.pki import Authority, Credentials, expiry

from .actions import IssueCertificate
from .observed import Job
from .render.pod import owned

RENEW_BEFORE = dt.timedelta(days=30)


def decoded(secret: Mapping[str, Any] | None) -> dict[str, bytes]:
    """A Secret's data. What does not decode is left out."""
    result = {}
    for key, value in ((secret or {}).get("data") or {}).items():
        try:
            result[str(key)] = base64.b64decode(value, validate=True)
        except (binascii.Error, TypeError, ValueError):
            continue
    return result


def load_authority(secret: Mapping[str, Any] | None, now: dt.datetime) -> Authority | None:
    """The CA in a Secret; None if there is none that serves any longer."""
    data = decoded(secret)
    try:
        authority = Authority.load(data[ids.CERTIFICATE_FILE], data[ids.KEY_FILE])
    except (KeyError, ValueError):
        return None
    return authority if authority.expires - now > RENEW_BEFORE else None


def load_credentials(secret: Mapping[str, Any] | None) -> Credentials | None:
    """The credentials in a Secret, unchecked."""
    data = decoded(secret)
    try:
        return Credentials(data[ids.CA_FILE], data[ids.CERTIFICATE_FILE], data[ids.KEY_FILE])
    except KeyError:
        return None


def serves(credentials: Credentials | None, authority: Authority, now: dt.datetime) -> bool:
    """Whether a certificate is this CA's and good for a while."""
    if credentials is None or credentials.ca.strip() != authority.certificate.strip():
        return False
    try:
        return expiry(credentials.certificate) - now > RENEW_BEFORE
    except ValueError:
        return False


def fingerprint(authority: Authority) -> str:
    """Tells one CA from the next."""
    return hashlib.sha256(authority.certificate).hexdigest()[:16]


def authority_secret(job: Job, name: str, days: int) -> dict[str, Any]:
    """A new CA, as a Secret."""
    authority = Authority.create(f"isthmus {job.namespace}/{job.name}", dt.timedelta(days=days))
    return _secret(job, name, {ids.CERTIFICATE_FILE: authority.certificate, ids.KEY_FILE: authority.key})


def leaf_secret(job: Job, authority: Authority, wanted: IssueCertificate) -> dict[str, Any]:
    """A new certificate, as a Secret."""
    lifetime = dt.timedelta(days=wanted.days)
    return _secret(
        job, wanted.secret, authority.issue(wanted.name, lifetime, hosts=wanted.hosts, uris=wanted.uris).files()
    )


def _secret(job: Job, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    data = {key: base64.b64encode(value).decode() for key, value in files.items()}
    return owned(job, "Secret", name, {"type": "kubernetes.io/tls", "data": data})
