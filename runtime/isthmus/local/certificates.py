"""The certificates of one local run: as the operator issues them for a job, but from a CA that ends with the run."""

import datetime as dt
from pathlib import Path

from isthmus_contracts import identities as ids
from isthmus_contracts.manifests.manifest import FederatedJob
from isthmus_contracts.wire.pki import Authority, Credentials

# A local run is short; a resumed one gets new certificates.
_LIFETIME = dt.timedelta(days=90)
AGGREGATOR = ".aggregator"  # no pool can have this name


def client_directory(directory: Path, pool: str, index: int) -> Path:
    """The directory of one client's certificate."""
    return directory / pool / str(index)


def issue_certificates(job: FederatedJob, uid: str, directory: Path) -> Credentials:
    """Write a directory for the aggregator and one for each client; return what the runner itself observes with."""
    authority = Authority.create(f"isthmus {job.name}", _LIFETIME)
    server = authority.issue("aggregator", _LIFETIME, hosts=[ids.aggregator_server_name(uid)])
    server.write(directory / AGGREGATOR)
    for pool in job.spec.pools:
        for index in range(pool.replicas):
            client = authority.issue(pool.name, _LIFETIME, uris=[ids.client_identity(uid, pool.name, index)])
            client.write(client_directory(directory, pool.name, index))
    return authority.issue("runner", _LIFETIME, uris=[ids.observer_identity(uid)])
