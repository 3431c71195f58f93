"""The certificates in a job's Secrets: whether they still do, and how they are made."""

import base64
import binascii
import datetime as dt
import hashlib
from collections.abc import Mapping
from typing import Any

from isthmus_contracts import identities as ids
from isthmus_contracts.pki import Authority, Credentials, expiry

from . import names
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


def load_authority(secret: Mapping[str, Any] | None) -> Authority | None:
    """The CA in a Secret, if there is one."""
    data = decoded(secret)
    try:
        return Authority.load(data[ids.CERTIFICATE_FILE], data[ids.KEY_FILE])
    except (KeyError, ValueError):
        return None


def ends_soon(authority: Authority, now: dt.datetime) -> bool:
    """Whether a CA is to be renewed."""
    return authority.expires - now <= RENEW_BEFORE


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


def digest(certificate: bytes) -> str:
    """Tells one certificate from the next."""
    return hashlib.sha256(certificate).hexdigest()[:16]


def fingerprint(secret: Mapping[str, Any] | None, authority: Authority) -> str:
    """Tells one CA from the next; a renewed one keeps that of its first certificate, as its Secret notes."""
    annotations = ((secret or {}).get("metadata") or {}).get("annotations") or {}
    first, _, key_id = str(annotations.get(names.ANNOTATION_AUTHORITY, "")).partition(".")
    return first if key_id == authority.key_id else digest(authority.certificate)


def authority_secret(job: Job, name: str, days: int, now: dt.datetime) -> dict[str, Any]:
    """A new CA, as a Secret."""
    authority = Authority.create(f"isthmus {job.namespace}/{job.name}", dt.timedelta(days=days), now)
    return _secret(job, name, {ids.CERTIFICATE_FILE: authority.certificate, ids.KEY_FILE: authority.key})


def renewed_authority_secret(
    job: Job, name: str, authority: Authority, known_as: str, days: int, now: dt.datetime
) -> dict[str, Any]:
    """The same CA for another while, as a Secret. ``known_as``: its fingerprint."""
    renewed = authority.renewed(dt.timedelta(days=days), now)
    body = _secret(job, name, {ids.CERTIFICATE_FILE: renewed.certificate, ids.KEY_FILE: renewed.key})
    body["metadata"]["annotations"] = {names.ANNOTATION_AUTHORITY: f"{known_as}.{renewed.key_id}"}
    return body


def leaf_secret(job: Job, authority: Authority, wanted: IssueCertificate, now: dt.datetime) -> dict[str, Any]:
    """A new certificate, as a Secret."""
    lifetime = dt.timedelta(days=wanted.days)
    leaf = authority.issue(wanted.name, lifetime, hosts=wanted.hosts, uris=wanted.uris, now=now)
    return _secret(job, wanted.secret, leaf.files())


def _secret(job: Job, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    data = {key: base64.b64encode(value).decode() for key, value in files.items()}
    return owned(job, "Secret", name, {"type": "kubernetes.io/tls", "data": data})
