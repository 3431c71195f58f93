"""Certificates and signing keys of a local run, as the operator and bridges issue them for a job, from a CA and roots
that are discarded after the run."""

import datetime as dt
from pathlib import Path

from isthmus_contracts import identities as ids
from isthmus_contracts.api.federated_job import Pool
from isthmus_contracts.manifests.manifest import FederatedJob
from isthmus_contracts.wire import parties
from isthmus_contracts.wire.pki import Authority, Credentials

# Longer than any local run; a resumed run gets new certificates.
_LIFETIME = dt.timedelta(days=90)
AGGREGATOR = ".aggregator"  # no pool can have this name
_CLOUD = "cloud"  # the party of all cloud pools
_SITE = "site."  # before the name of a site, which may be "cloud"


def client_directory(directory: Path, pool: str, index: int) -> Path:
    """Return the directory of one client's certificate."""
    return directory / pool / str(index)


def issue_certificates(job: FederatedJob, uid: str, directory: Path) -> Credentials:
    """Write certificates for the aggregator and for each client; return those with which the runner observes."""
    authority = Authority.create(f"isthmus {job.name}", _LIFETIME)
    server = authority.issue("aggregator", _LIFETIME, hosts=[ids.aggregator_server_name(uid)])
    server.write(directory / AGGREGATOR)
    for pool in job.spec.pools:
        for index in range(pool.replicas):
            client = authority.issue(pool.name, _LIFETIME, uris=[ids.client_identity(uid, pool.name, index)])
            client.write(client_directory(directory, pool.name, index))
    _issue_signing_keys(job, uid, directory)
    return authority.issue("runner", _LIFETIME, uris=[ids.observer_identity(uid)])


def _issue_signing_keys(job: FederatedJob, uid: str, directory: Path) -> None:
    """Write each client's signing key, credential and trust file, if the job has secure aggregation.

    There are as many parties as in a cluster, so that a manifest with minParties runs. All their roots are made here,
    though, so they are no protection from each other.
    """
    secure = job.spec.privacy.secure_aggregation
    if secure is None:
        return
    keys = {party: parties.new_root() for party in dict.fromkeys(map(_party, job.spec.pools))}
    trust = parties.Trust(
        roots={party: public for party, (_, public) in keys.items()},
        min_parties=secure.min_parties,
        min_clients=secure.min_clients,
        required=True,
        noise_multiplier=job.spec.clients_noise_multiplier,
    )
    for pool in job.spec.pools:
        party = _party(pool)
        key, credential = parties.issue(keys[party][0], party, uid, pool.name)
        for index in range(pool.replicas):
            parties.write_party_files(client_directory(directory, pool.name, index), key, credential, trust)


def _party(pool: Pool) -> str:
    return f"{_SITE}{pool.hpc.site_ref.name}" if pool.hpc is not None else _CLOUD
