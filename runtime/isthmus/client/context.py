"""Identity of the client that this process is."""

import os
from dataclasses import dataclass

from isthmus_contracts import identities


@dataclass(frozen=True)
class Context:
    """This client's position in the federation. Outside a federation: the only client of an unnamed pool."""

    pool: str = ""
    index: int = 0
    """Index within the pool, from 0."""
    pool_size: int = 1
    client: int = 0
    """Index within the whole job, from 0, by which to partition data. Clients that only evaluate are counted apart."""
    clients: int = 1
    """Number of the job's clients that train, or, at a client that only evaluates, of those that only evaluate."""
    attempt: int = 0
    """Number of earlier starts of this client."""
    data: str = ""
    """Path of the pool's data set, if the site configures one."""

    @property
    def federated(self) -> bool:
        """True if this process is part of a federation."""
        return bool(self.pool)


def context() -> Context:
    """Return the context of this process, from its environment.

    Raises ``ValueError`` if a variable that must hold a number does not.
    """
    environ = os.environ
    data = environ.get(identities.ENV_DATA, "")
    if not environ.get(identities.ENV_ENDPOINT):
        return Context(data=data)

    def number(name: str, default: int) -> int:
        try:
            return int(environ.get(name, default))
        except ValueError:
            raise ValueError(f"{name} must be a whole number, not {environ[name]!r}") from None

    return Context(
        pool=environ.get(identities.ENV_POOL, ""),
        index=number(identities.ENV_INDEX, 0),
        pool_size=number(identities.ENV_POOL_SIZE, 1),
        client=number(identities.ENV_CLIENT, 0),
        clients=number(identities.ENV_CLIENTS, 1),
        attempt=number(identities.ENV_ATTEMPT, 0),
        data=data,
    )
