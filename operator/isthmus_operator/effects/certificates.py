"""The certificates in a job's Secrets: creation and checks."""

import base64
import binascii
import datetime as dt
import hashlib
from collections.abc import Mapping
from typing import Any

from isthmus_contracts import identities as ids
from isthmus_contracts.wire import parties
from isthmus_contracts.wire.pki import Authority, Credentials, expiry

from .. import names
from ..planning.actions import IssueCertificate, Signing
from ..render.pod import owned
from ..state.observed import Job
from ..state.parties import ClusterParty

RENEW_BEFORE = dt.timedelta(days=30)


def decoded(secret: Mapping[str, Any] | None) -> dict[str, bytes]:
    """Return a Secret's data, without values that do not decode."""
    result = {}
    for key, value in ((secret or {}).get("data") or {}).items():
        try:
            result[str(key)] = base64.b64decode(value, validate=True)
        except (binascii.Error, TypeError, ValueError):
            continue
    return result


def load_authority(secret: Mapping[str, Any] | None) -> Authority | None:
    """Return the CA in a Secret, if it contains one."""
    data = decoded(secret)
    try:
        return Authority.load(data[ids.CERTIFICATE_FILE], data[ids.KEY_FILE])
    except (KeyError, ValueError):
        return None


def ends_soon(authority: Authority, now: dt.datetime) -> bool:
    """Return True if a CA is to be renewed."""
    return authority.expires - now <= RENEW_BEFORE


def load_credentials(secret: Mapping[str, Any] | None) -> Credentials | None:
    """Return the credentials in a Secret, unchecked."""
    data = decoded(secret)
    try:
        return Credentials(data[ids.CA_FILE], data[ids.CERTIFICATE_FILE], data[ids.KEY_FILE])
    except KeyError:
        return None


def is_valid(credentials: Credentials | None, authority: Authority, now: dt.datetime) -> bool:
    """Return True if a certificate is signed by this CA and does not expire soon."""
    if credentials is None or credentials.ca.strip() != authority.certificate.strip():
        return False
    try:
        return expiry(credentials.certificate) - now > RENEW_BEFORE
    except ValueError:
        return False


def is_current(
    secret: Mapping[str, Any] | None,
    wanted: IssueCertificate,
    authority: Authority,
    now: dt.datetime,
    party: ClusterParty | None = None,
) -> bool:
    """Return True if a Secret holds all wanted certificates, signed by this CA and not expiring soon.

    With secure aggregation, also the signing key that ``party`` certified, and the wanted trust file.
    """
    if not wanted.clients:
        return is_valid(load_credentials(secret), authority, now)
    data = decoded(secret)
    if set(data) != _names(wanted):
        return False
    if wanted.signing is not None and not _may_sign(data, wanted.signing, party):
        return False
    files = [ids.client_files(index) for index, _ in wanted.clients]
    return all(is_valid(Credentials(data[ids.CA_FILE], data[crt], data[key]), authority, now) for crt, key in files)


def version(secret: Mapping[str, Any] | None) -> str:
    """Return a digest of the certificates in a Secret, without the CA's."""
    data = decoded(secret)
    return digest(b"".join(data[name] for name in sorted(data) if name.endswith(".crt") and name != ids.CA_FILE))


def _names(wanted: IssueCertificate) -> set[str]:
    signing = ids.PARTY_FILES if wanted.signing is not None else ()
    return {ids.CA_FILE, *signing, *(name for index, _ in wanted.clients for name in ids.client_files(index))}


def _may_sign(data: Mapping[str, bytes], signing: Signing, party: ClusterParty | None) -> bool:
    """Return True if the signing key is certified for this pool, and the trust file is the wanted one."""
    if signing.trust and data[ids.TRUST_FILE].decode(errors="replace") != signing.trust:
        return False
    if party is None:
        return True  # the root cannot be read now
    try:
        credential = parties.Credential.parse(data[ids.CREDENTIAL_FILE])
        parties.Signer(data[ids.SIGNING_KEY_FILE], credential)
        parties.verify(credential, party.root)
    except parties.PartyError:
        return False
    return (credential.party, credential.job_uid, credential.pool) == (party.name, signing.job_uid, signing.pool)


def digest(certificate: bytes) -> str:
    """Return a short digest that identifies a certificate."""
    return hashlib.sha256(certificate).hexdigest()[:16]


def fingerprint(secret: Mapping[str, Any] | None, authority: Authority) -> str:
    """Return the fingerprint of a CA. A renewed CA keeps that of its first certificate, which its Secret stores."""
    annotations = ((secret or {}).get("metadata") or {}).get("annotations") or {}
    first, _, key_id = str(annotations.get(names.ANNOTATION_AUTHORITY, "")).partition(".")
    return first if key_id == authority.key_id else digest(authority.certificate)


def authority_secret(job: Job, name: str, days: int, now: dt.datetime) -> dict[str, Any]:
    """Create a CA, as a Secret."""
    authority = Authority.create(f"isthmus {job.namespace}/{job.name}", dt.timedelta(days=days), now)
    return _secret(job, name, {ids.CERTIFICATE_FILE: authority.certificate, ids.KEY_FILE: authority.key})


def renewed_authority_secret(
    job: Job, name: str, authority: Authority, known_as: str, days: int, now: dt.datetime
) -> dict[str, Any]:
    """Renew a CA with its key, as a Secret. ``known_as``: its fingerprint."""
    renewed = authority.renewed(dt.timedelta(days=days), now)
    body = _secret(job, name, {ids.CERTIFICATE_FILE: renewed.certificate, ids.KEY_FILE: renewed.key})
    body["metadata"]["annotations"] = {names.ANNOTATION_AUTHORITY: f"{known_as}.{renewed.key_id}"}
    return body


def leaf_secret(
    job: Job, authority: Authority, wanted: IssueCertificate, now: dt.datetime, party: ClusterParty | None = None
) -> dict[str, Any]:
    """Issue certificates, as a Secret. For hundreds of clients this takes 0.1 s.

    ``party``: signs the clients' signing key, if they have one.
    """
    lifetime = dt.timedelta(days=wanted.days)
    if wanted.clients:
        files = {ids.CA_FILE: authority.certificate}
        for index, identity in wanted.clients:
            crt, key = ids.client_files(index)
            client = authority.issue(f"{wanted.name} {index}", lifetime, uris=(identity,), now=now)
            files |= {crt: client.certificate, key: client.key}
        if wanted.signing is not None:
            assert party is not None
            signing_key, credential = parties.issue(
                party.root_key, party.name, wanted.signing.job_uid, wanted.signing.pool
            )
            trust = parties.Trust.parse(wanted.signing.trust)
            files |= parties.party_files(signing_key, credential, trust)
        return _secret(job, wanted.secret, files, "Opaque")
    leaf = authority.issue(wanted.name, lifetime, hosts=wanted.hosts, uris=wanted.uris, now=now)
    return _secret(job, wanted.secret, leaf.files())


def _secret(job: Job, name: str, files: Mapping[str, bytes], kind: str = "kubernetes.io/tls") -> dict[str, Any]:
    data = {key: base64.b64encode(value).decode() for key, value in files.items()}
    return owned(job, "Secret", name, {"type": kind, "data": data})
