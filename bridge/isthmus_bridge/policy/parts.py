"""Parts of the policy that stand at several of its places: a site's own sbatch options, and caps."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from isthmus_contracts.api.fields import SlurmName

from ..slurm import options
from ..slurm.options import Options
from .fields import Line

# A generic resource, or one type of it: gpu, gpu:a100.
GresName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*(:[A-Za-z0-9][A-Za-z0-9_.+-]*)?$", max_length=129)
]


def _form(pattern: str) -> Any:
    return Field(pattern=f"^({pattern})$", max_length=options.LONGEST)


def _one_line(text: str) -> str:
    # A pattern's `$` lets a trailing newline pass.
    if "\n" in text:
        raise ValueError("must be one line")
    return text


class Part(BaseModel):
    """A part of the policy: fields that it does not know are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SbatchOptions(Part):
    """Options that the site's admin adds to sbatch. No manifest can name them."""

    constraint: Annotated[str, _form(options.CONSTRAINT), AfterValidator(_one_line)] | None = None
    """Features of the nodes, in sbatch's notation: ``gpu``, ``a100&nvme``."""
    reservation: Annotated[str, _form(options.NAMES), AfterValidator(_one_line)] | None = None
    """One reservation or several, separated by commas."""
    qos: SlurmName | None = None
    """For jobs whose manifest names none."""
    exclusive: bool | Literal["user", "mcs"] | None = None
    """Whole nodes; ``user``: shared with jobs of the same user only."""
    wckey: Annotated[str, _form(options.NAMES), AfterValidator(_one_line)] | None = None
    licenses: Annotated[str, _form(options.LICENSES), AfterValidator(_one_line)] | None = None
    """In sbatch's notation: ``scratch``, ``matlab@server:2``."""
    memory: Literal["per-node", "per-cpu", "per-gpu", "none"] | None = None
    """How a job's memory is asked for: --mem (the default), --mem-per-cpu, --mem-per-gpu (where it has GPUs), or not
    at all, where memory follows from something else."""
    gpus: Literal["gres", "per-task", "per-node", "per-job"] | None = None
    """How its GPUs are asked for: --gres=gpu:… (the default), --gpus-per-task, --gpus-per-node or --gpus."""
    threads_per_core: Annotated[int, Field(ge=1, le=64)] | None = None
    nice: Annotated[int, Field(ge=-10_000, le=2_147_483_645)] | None = None
    hint: Literal["compute_bound", "memory_bound", "multithread", "nomultithread"] | None = None
    """With ``adapter: cli`` only, as are the following."""
    gres_flags: Literal["enforce-binding", "disable-binding"] | None = None
    switches: Annotated[str, _form(options.SWITCHES), AfterValidator(_one_line)] | None = None
    """In sbatch's notation: ``1``, ``1@2:00:00``."""
    nodelist: Annotated[str, _form(options.NODES), AfterValidator(_one_line)] | None = None
    exclude: Annotated[str, _form(options.NODES), AfterValidator(_one_line)] | None = None
    """Nodes that get none of these jobs: ``node[01-03],node7``."""
    tmp_mib: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    """Local disk space of the node."""

    def stated(self) -> dict[str, Any]:
        """Return what stands here, by name, as :class:`~..slurm.options.Options` takes it."""
        found = {name: value for name, value in self if value is not None and name != "qos"}
        if isinstance(found.get("exclusive"), bool):
            found["exclusive"] = "yes" if found["exclusive"] else ""
        return found


def merged(levels: Iterable[SbatchOptions | None]) -> tuple[Options, str]:
    """Return the options and the default QOS of several places; what a later one states holds."""
    found, qos = Options(), ""
    for level in levels:
        if level is not None:
            found, qos = found.with_(level.stated()), level.qos or qos
    return found, qos


class Limits(Part):
    """Caps on every request."""

    replicas: Annotated[int, Field(ge=1)] = 256
    """Clients of a pool."""
    cpus_per_task: Annotated[int, Field(ge=1)] = 64
    """Of each task of an array, with all the clients that share it; likewise memory_mib and gres."""
    memory_mib: Annotated[int, Field(ge=1)] = 262_144
    time_limit_seconds: Annotated[int, Field(ge=60)] = 86_400
    """Holds in whole minutes, rounded down: Slurm knows no others."""
    gres: dict[GresName, Annotated[int, Field(ge=0)]] = {}
    """Most of each generic resource per task, or of one type of it (``gpu:a100``). What is not listed is not allowed.
    A request that names no type counts as each type."""
    running_tasks: Annotated[int, Field(ge=1)] | None = None
    """Clients of a pool's array that run at the same time; the others wait. Each part by which a pool has grown is an
    array of its own. Default: all of them."""
    pools: Annotated[int, Field(ge=1)] = 32
    """Live pools of one identity."""
    pools_per_day: Annotated[int, Field(ge=1)] | None = None
    """Pools that one identity may ask for within 24 hours."""
    total_tasks: Annotated[int, Field(ge=1)] | None = None
    """Clients of all live pools of one identity together; likewise the following, of what their tasks hold."""
    total_cpus: Annotated[int, Field(ge=1)] | None = None
    total_memory_mib: Annotated[int, Field(ge=1)] | None = None
    total_gres: dict[GresName, Annotated[int, Field(ge=0)]] = {}
    """Of each generic resource, or of one type of it; what is not listed has no such limit."""


class AllCallers(Part):
    """Caps on the live pools of all identities together."""

    pools: Annotated[int, Field(ge=1)] | None = None
    total_tasks: Annotated[int, Field(ge=1)] | None = None
    total_cpus: Annotated[int, Field(ge=1)] | None = None
    total_memory_mib: Annotated[int, Field(ge=1)] | None = None
    total_gres: dict[GresName, Annotated[int, Field(ge=0)]] = {}


Reason = Annotated[Line, Field(max_length=200)]
