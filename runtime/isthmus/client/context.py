"""Which client this process is."""

import os
from dataclasses import dataclass

from isthmus_contracts import identities


@dataclass(frozen=True)
class Context:
    """This client's place in the federation. Outside of one: the only client of a nameless pool."""

    pool: str = ""
    index: int = 0
    """Within the pool, from 0."""
    pool_size: int = 1
    client: int = 0
    """Within the whole job, from 0: what a partition of the data goes by. Clients that only evaluate count apart."""
    clients: int = 1
    """Of the whole job: those that train, or at a client that only evaluates, those that do so too."""
    attempt: int = 0
    """How often the scheduler has started this client before."""
    data: str = ""
    """Path of the pool's data set, where the site names one."""

    @property
    def federated(self) -> bool:
        """True if there is a federation at all."""
        return bool(self.pool)


def context() -> Context:
    """The context of this process, from its environment. Raises ``ValueError`` for an environment that is not ours."""
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
