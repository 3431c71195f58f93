"""Certificates of a local run, as the operator issues them for a job, from a CA that is discarded after the run."""

import datetime as dt
from pathlib import Path

from isthmus_contracts import identities as ids
from isthmus_contracts.manifests.manifest import FederatedJob
from isthmus_contracts.wire.pki import Authority, Credentials

# Longer than any local run; a resumed run gets new certificates.
_LIFETIME = dt.timedelta(days=90)
AGGREGATOR = ".aggregator"  # no pool can have this name


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
    return authority.issue("runner", _LIFETIME, uris=[ids.observer_identity(uid)])
