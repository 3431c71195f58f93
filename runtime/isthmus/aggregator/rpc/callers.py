"""Identification of callers by their certificates: one client, or an HPC pool, whose clients share a certificate."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.identities import client_identity, pool_identity

from ..clients.membership import ClientId

_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Caller:
    """Identity in a caller's certificate."""

    pool: str
    index: int | None
    """Index of the client; ``None`` for any client of the pool."""
    clients: int
    """Number of clients that it may speak for."""

    def __str__(self) -> str:
        return self.pool if self.index is None else f"{self.pool}/{self.index}"

    def speaks_for(self, client: ClientId) -> bool:
        """Return whether it may act as this client."""
        return client[0] == self.pool and self.index in (None, client[1])


class Callers:
    """Identities of one job."""

    def __init__(self, spec: FederatedJobSpec, job_uid: str) -> None:
        self._whole = {
            pool_identity(job_uid, pool.name): Caller(pool.name, None, pool.size)
            for pool in spec.pools
            if pool.hpc is not None
        }
        self._prefixes = {client_identity(job_uid, pool.name, 0)[:-1]: pool.name for pool in spec.pools}

    def find(self, uris: Iterable[str]) -> Caller | None:
        """Return the caller that a certificate with these URIs identifies; ``None`` if it is not of this job."""
        for uri in uris:
            if (whole := self._whole.get(uri)) is not None:
                return whole
            prefix, _, index = uri.rpartition("/")
            pool = self._prefixes.get(f"{prefix}/")
            if pool is not None and _INDEX.fullmatch(index):
                return Caller(pool, int(index), 1)
        return None
