"""Translation of a manifest to one machine: clients, their command lines and environments."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus_contracts import identities as ids
from isthmus_contracts.manifests.manifest import FederatedJob
from isthmus_contracts.process.backoff import delay

_THREADS = "OMP_NUM_THREADS"
# Variables in which torchrun and mpirun pass a process its rank. Values left over in a shell are not for clients.
_RANK_VARIABLES = frozenset({
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE",
})  # fmt: skip
_RANK_PREFIX = "TORCHELASTIC_"
_BACKOFF_SECONDS = 1.0
_BACKOFF_LIMIT_SECONDS = 30.0


@dataclass(frozen=True)
class LocalClient:
    """One client of a pool, of the cloud or of an HPC site."""

    pool: str
    index: int
    pool_size: int
    number: int
    """Index within the job, from 0; clients that only evaluate are numbered apart."""

    @property
    def name(self) -> str:
        """Name that is unique within the job, and valid as a file name."""
        return f"{self.pool}-{self.index}"


def local_clients(job: FederatedJob) -> list[LocalClient]:
    """Return all clients of the job, pool by pool."""
    return [
        LocalClient(pool.name, index, pool.size, job.spec.first_client(pool.name) + index)
        for pool in job.spec.pools
        for index in range(pool.replicas)
    ]


def local_command(command: Sequence[str]) -> list[str]:
    """Return the manifest's command, with the runner's own interpreter for ``python``, since there is no image."""
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
    """Return a client's environment: the runner's, the manifest's, then the variables of Isthmus."""
    clients = job.spec.total_clients
    environment = inherited(base)
    # Several processes share the machine, so none may start a thread per core.
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
    """Return an environment without the variables of other federations and process groups.

    The path of the user's data set is kept.
    """
    environment = {name: value for name, value in base.items() if _passes(name)}
    # Programs installed beside the interpreter (torchrun, for example) are found first. Output is written to logs
    # immediately.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", os.defpath)])
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def _passes(name: str) -> bool:
    """Return whether a variable of the runner's environment is passed to the processes of a run."""
    if name.startswith(ids.RESERVED_ENV_PREFIX):
        return name == ids.ENV_DATA
    return name not in _RANK_VARIABLES and not name.startswith(_RANK_PREFIX)


def backoff(failures: int) -> float:
    """Return the seconds to wait before the next start, after ``failures`` in a row (from 1): 1, 2, 4, ... 30."""
    return delay(failures, _BACKOFF_SECONDS, _BACKOFF_LIMIT_SECONDS)
