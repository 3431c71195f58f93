"""Parts of the policy that occur at several places: a site's own sbatch options, and limits."""

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
    """A part of the policy. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SbatchOptions(Part):
    """Options that the site's admin adds to sbatch. Manifests cannot set them."""

    constraint: Annotated[str, _form(options.CONSTRAINT), AfterValidator(_one_line)] | None = None
    """Features of the nodes, in sbatch's notation: ``gpu``, ``a100&nvme``."""
    reservation: Annotated[str, _form(options.NAMES), AfterValidator(_one_line)] | None = None
    """One reservation or several, separated by commas."""
    qos: SlurmName | None = None
    """QOS of jobs whose manifest names none."""
    exclusive: bool | Literal["user", "mcs"] | None = None
    """Whole nodes; ``user``: shared with jobs of the same user only."""
    wckey: Annotated[str, _form(options.NAMES), AfterValidator(_one_line)] | None = None
    licenses: Annotated[str, _form(options.LICENSES), AfterValidator(_one_line)] | None = None
    """In sbatch's notation: ``scratch``, ``matlab@server:2``."""
    memory: Literal["per-node", "per-cpu", "per-gpu", "none"] | None = None
    """Option for a job's memory: --mem (the default), --mem-per-cpu, --mem-per-gpu (if it has GPUs), or not at
    all, if memory follows from something else."""
    gpus: Literal["gres", "per-task", "per-node", "per-job"] | None = None
    """Option for its GPUs: --gres=gpu:… (the default), --gpus-per-task, --gpus-per-node or --gpus."""
    threads_per_core: Annotated[int, Field(ge=1, le=64)] | None = None
    nice: Annotated[int, Field(ge=-10_000, le=2_147_483_645)] | None = None
    hint: Literal["compute_bound", "memory_bound", "multithread", "nomultithread"] | None = None
    """This and the following options need ``adapter: cli``."""
    gres_flags: Literal["enforce-binding", "disable-binding"] | None = None
    switches: Annotated[str, _form(options.SWITCHES), AfterValidator(_one_line)] | None = None
    """In sbatch's notation: ``1``, ``1@2:00:00``."""
    nodelist: Annotated[str, _form(options.NODES), AfterValidator(_one_line)] | None = None
    exclude: Annotated[str, _form(options.NODES), AfterValidator(_one_line)] | None = None
    """Nodes that must not run these jobs: ``node[01-03],node7``."""
    tmp_mib: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    """Local disk space of the node, in MiB."""

    def stated(self) -> dict[str, Any]:
        """Return the options that are set, by name, as :class:`~..slurm.options.Options` takes them."""
        found = {name: value for name, value in self if value is not None and name != "qos"}
        if isinstance(found.get("exclusive"), bool):
            found["exclusive"] = "yes" if found["exclusive"] else ""
        return found


def merged(levels: Iterable[SbatchOptions | None]) -> tuple[Options, str]:
    """Return the options and the default QOS of several levels; later levels override earlier ones."""
    found, qos = Options(), ""
    for level in levels:
        if level is not None:
            found, qos = found.with_(level.stated()), level.qos or qos
    return found, qos


class Limits(Part):
    """Limits on every request."""

    replicas: Annotated[int, Field(ge=1)] = 256
    """Clients of a pool."""
    cpus_per_task: Annotated[int, Field(ge=1)] = 64
    """CPUs of each task of an array, for all clients that share it; likewise memory_mib and gres."""
    memory_mib: Annotated[int, Field(ge=1)] = 262_144
    time_limit_seconds: Annotated[int, Field(ge=60)] = 86_400
    """Applied in whole minutes, rounded down, as Slurm's time limits are."""
    gres: dict[GresName, Annotated[int, Field(ge=0)]] = {}
    """Maximum of each generic resource per task, or of one type of it (``gpu:a100``). Unlisted resources are not
    allowed. A request without a type counts as each type."""
    running_tasks: Annotated[int, Field(ge=1)] | None = None
    """Clients of a pool's array that may run at the same time; the others wait. Each part by which a pool has grown is
    an array of its own. Default: no limit."""
    pools: Annotated[int, Field(ge=1)] = 32
    """Live pools of one identity."""
    pools_per_day: Annotated[int, Field(ge=1)] | None = None
    """Pools that one identity may request within 24 hours."""
    total_tasks: Annotated[int, Field(ge=1)] | None = None
    """Clients of all live pools of one identity together; the following limit what their tasks hold together."""
    total_cpus: Annotated[int, Field(ge=1)] | None = None
    total_memory_mib: Annotated[int, Field(ge=1)] | None = None
    total_gres: dict[GresName, Annotated[int, Field(ge=0)]] = {}
    """Maximum of each generic resource, or of one type of it; unlisted resources have no such limit."""


class AllCallers(Part):
    """Limits on the live pools of all identities together."""

    pools: Annotated[int, Field(ge=1)] | None = None
    total_tasks: Annotated[int, Field(ge=1)] | None = None
    total_cpus: Annotated[int, Field(ge=1)] | None = None
    total_memory_mib: Annotated[int, Field(ge=1)] | None = None
    total_gres: dict[GresName, Annotated[int, Field(ge=0)]] = {}


Reason = Annotated[Line, Field(max_length=200)]
