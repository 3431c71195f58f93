"""What a manifest means on one machine: which clients there are, their command lines and environments."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus_contracts import identities as ids
from isthmus_contracts.manifests.manifest import FederatedJob

_THREADS = "OMP_NUM_THREADS"
# What torchrun and mpirun tell a process of its place among others. Left in a shell, it is no client's place.
_PLACES = frozenset({
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE",
})  # fmt: skip
_PLACE_PREFIX = "TORCHELASTIC_"
_BACKOFF_SECONDS = 1.0
_BACKOFF_LIMIT_SECONDS = 30.0


@dataclass(frozen=True)
class LocalClient:
    """One client of a pool, whichever world the manifest puts it in."""

    pool: str
    index: int
    pool_size: int
    number: int
    """Within the job, from 0; clients that only evaluate have numbers of their own."""

    @property
    def name(self) -> str:
        """Unique within the job, and a file name."""
        return f"{self.pool}-{self.index}"


def local_clients(job: FederatedJob) -> list[LocalClient]:
    """Every client of the job, pool by pool."""
    return [
        LocalClient(pool.name, index, pool.size, job.spec.first_client(pool.name) + index)
        for pool in job.spec.pools
        for index in range(pool.replicas)
    ]


def local_command(command: Sequence[str]) -> list[str]:
    """The manifest's command with our own interpreter for ``python``: there is no image here."""
    if command[0] in ("python", "python3"):
        return [sys.executable, *command[1:]]
    return list(command)


def client_environment(
    base: Mapping[str, str],
    job: FederatedJob,
    uid: str,
    client: LocalClient,
    attempt: int,
    endpoint: str,
    tls: Path,
    scratch: Path,
) -> dict[str, str]:
    """A client's environment: ours, the manifest's, then what Isthmus says."""
    clients = job.spec.total_clients
    environment = inherited(base)
    # With several processes on one machine each must not start a thread per core.
    environment.setdefault(_THREADS, str(max(1, (os.cpu_count() or 1) // clients)))
    environment |= {variable.name: variable.value for variable in job.spec.task.env}
    environment |= {
        ids.ENV_ENDPOINT: endpoint,
        ids.ENV_SERVER_NAME: ids.aggregator_server_name(uid),
        ids.ENV_TLS_DIR: str(tls),
        ids.ENV_JOB_UID: uid,
        ids.ENV_JOB: f"{job.namespace}/{job.name}",
        ids.ENV_POOL: client.pool,
        ids.ENV_INDEX: str(client.index),
        ids.ENV_POOL_SIZE: str(client.pool_size),
        ids.ENV_CLIENT: str(client.number),
        ids.ENV_CLIENTS: str(job.spec.clients_beside(client.pool)),
        ids.ENV_ATTEMPT: str(attempt),
        ids.ENV_SCRATCH: str(scratch),
    }
    return environment


def inherited(base: Mapping[str, str]) -> dict[str, str]:
    """Our environment without the settings of other federations and process groups.

    The data set that the user points at stays.
    """
    environment = {name: value for name, value in base.items() if _passes(name)}
    # What is installed beside our interpreter (torchrun, for one) is found first; output reaches the logs as it comes.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", os.defpath)])
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def _passes(name: str) -> bool:
    """Return whether a variable of our environment is for the processes of a run too."""
    if name.startswith(ids.RESERVED_ENV_PREFIX):
        return name == ids.ENV_DATA
    return name not in _PLACES and not name.startswith(_PLACE_PREFIX)


def backoff(failures: int) -> float:
    """Seconds to wait before the next start, after so many failures in a row (from 1): 1, 2, 4, ... 30."""
    return min(_BACKOFF_SECONDS * 2.0 ** (failures - 1), _BACKOFF_LIMIT_SECONDS)
