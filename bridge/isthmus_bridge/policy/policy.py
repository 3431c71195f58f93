"""The site's policy file: its form, and reading it with one-line errors. Decisions are in :mod:`.authorization`."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from isthmus_contracts.api.fields import PATTERN_OBJECT_NAME, DnsLabel, EnvName, SlurmAccount, SlurmName
from isthmus_contracts.identities import BRIDGE_PORT, RESERVED_ENV_PREFIX

from ..slurm.options import LACKING
from . import strict_yaml
from .fields import (
    PLAIN_PATH,
    AbsolutePath,
    IdentityUri,
    Line,
    Listen,
    ProxyUrl,
    UserName,
    Value,
    absolute,
    of_each_user,
    rest_url,
)
from .parts import AllCallers, Limits, Part, Reason, SbatchOptions

# In tls_dir, beside the bridge's own certificate.
GATEWAY_CA_FILE = "gateway-ca.crt"
PLACEHOLDERS = ("tls_dir", "work_dir", "data", "image")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


class PolicyError(ValueError):
    """The policy file cannot be used. ``str()`` is one line that names every fault."""


class Identity(Part):
    """Who may ask, and for what."""

    uri: IdentityUri
    """The URI in the caller's certificate."""
    accounts: list[SlurmAccount] | None = None
    """Slurm accounts of this caller; the first is the default. Default: the site's."""
    namespaces: list[Line] = ["*"]
    """Patterns (``*``, ``?``) of the Kubernetes namespaces whose jobs may come."""
    partitions: list[SlurmName] | None = None
    """Default: the site's; likewise the following."""
    qos: list[SlurmName] | None = None
    environments: list[DnsLabel] | None = None
    data_sets: list[DnsLabel] | None = None
    code_files: bool | None = None
    limits: Limits | None = None
    """Each cap that stands here holds for this caller in the place of the site's."""
    sbatch: SbatchOptions | None = None
    """Options for its jobs, in the place of the environment's, the partition's and the site's."""
    drain: Reason | None = None
    """Why nothing new is taken from this caller; as the site's ``drain``."""
    user: UserName | None = None
    """The local user who owns this caller's jobs and their files; see ``users``. Default: who runs the bridge."""


class Inside(Part):
    """How a container calls the directories that its prefix binds."""

    tls_dir: AbsolutePath | None = None
    work_dir: AbsolutePath | None = None
    data: AbsolutePath | None = None


class Environment(Part):
    """One way to run the script: exactly one of venv, modules (with or without a venv), apptainer and prefix."""

    venv: AbsolutePath | None = None
    modules: list[Line] = []
    apptainer: AbsolutePath | None = None
    options: list[Line] = []
    """Of ``apptainer exec``: ``--nv``, more binds."""
    prefix: list[Line] = []
    """Written before the script's command line. May name {tls_dir}, {work_dir}, {data} and {image}; an argument with
    {data} is left out where the pool has no data set."""
    images: list[Line] = []
    """Patterns of the images that {image} may become."""
    inside: Inside = Inside()
    setup: list[Line] = []
    """Lines of bash, run before the script; the first that fails ends the task."""
    env: dict[EnvName, Value] = {}
    sbatch: SbatchOptions | None = None
    """Options for jobs with this environment, in the place of the partition's and the site's."""
    env_denied: list[Line] = []
    """Patterns of variables that a job must not set here, besides the site's ``env_denied``."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = {
            "venv": bool(self.venv) and not self.modules,
            "modules": bool(self.modules),
            "apptainer": bool(self.apptainer),
            "prefix": bool(self.prefix),
        }
        if sum(kinds.values()) != 1:
            raise ValueError("needs exactly one of venv, modules, apptainer and prefix")
        if self.venv and (self.apptainer or self.prefix):
            raise ValueError("venv goes with modules or alone")
        if self.options and not self.apptainer:
            raise ValueError("options goes with apptainer")
        if self.inside != Inside() and not self.prefix:
            raise ValueError("inside goes with prefix")
        names = {name for argument in self.prefix for name in _PLACEHOLDER.findall(argument)}
        if unknown := sorted(names - set(PLACEHOLDERS)):
            raise ValueError(f"prefix: unknown placeholder {{{unknown[0]}}}; it knows {', '.join(PLACEHOLDERS)}")
        if self.prefix and _PLACEHOLDER.search(self.prefix[0]):
            raise ValueError("prefix: the program itself must not be a placeholder")
        if ("image" in names) != bool(self.images):
            raise ValueError("a prefix with {image} needs images, the patterns that it may become, and only such a one")
        if reserved := [name for name in self.env if name.startswith(RESERVED_ENV_PREFIX)]:
            raise ValueError(f"env.{reserved[0]}: names that begin with {RESERVED_ENV_PREFIX} are reserved")
        return self

    @property
    def runs_image(self) -> bool:
        """True if the job's own image is run."""
        return bool(self.images)


class UserSettings(Part):
    """How jobs are submitted as other local users: through sudo, by the rule that `isthmus-bridge sudoers` prints."""

    run_dir: Annotated[Path, AfterValidator(absolute), AfterValidator(of_each_user)]
    """Where the pools of a local user have their directories, with {user} in the name's place; shared with the nodes.
    Made as that user, private to it."""
    sudo: AbsolutePath = Path("/usr/bin/sudo")
    operator: bool = False
    """The bridge's user is an operator of Slurm: it sees other users' jobs also where PrivateData hides them."""


class RelaySettings(Part):
    """Passes the clients' TLS connections on to the aggregators, where the compute nodes cannot reach them."""

    listen: Listen
    """Where the compute nodes reach the relay."""
    address: Listen
    """The same as they dial it, host:port."""
    destinations: Annotated[list[Line], Field(min_length=1)]
    """Patterns (``*``, ``?``) of the aggregators' host:port that it may dial. One of numbers (10.1.*:7443) matches
    addresses, no names; one of IPv6 addresses has brackets ([2001:db8::*]:7443)."""
    connections: Annotated[int, Field(ge=1, le=100_000)] = 4096
    """Open at the same time, over all pools, as far as the limit of open files goes: each takes two. Each pool may have
    two for each client, and a few."""


class RestSettings(Part):
    """How to reach slurmrestd."""

    url: Annotated[str, Field(max_length=1024), AfterValidator(rest_url)]
    """``unix:/path/of/its/socket``, ``https://host:port``, or ``http://localhost:port`` on the very machine."""
    ca_file: AbsolutePath | None = None
    """Certificates (PEM) that vouch for an https server. Default: the system's."""
    token_file: AbsolutePath | None = None
    """A file with the bridge's user's token (JWT) that somebody renews; read at every request. Or:"""
    token_command: list[Line] = []
    """A program that prints a token, with its arguments: [scontrol, token, lifespan=3600]. Run whenever one is due."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.token_file) == bool(self.token_command):
            raise ValueError("needs exactly one of token_file and token_command")
        return self


class PyslurmSettings(Part):
    """How to run pyslurm."""

    python: AbsolutePath | None = None
    """The Python that has pyslurm. Default: the bridge's own."""


class GatewaySettings(Part):
    """An operator's gateway, which the bridge dials because nobody can dial the bridge."""

    address: Listen
    """host:port."""
    ca: AbsolutePath | None = None
    """The authority of the gateway's certificate, in PEM. Default: gateway-ca.crt in tls_dir; where that is not there,
    the public ones."""
    server_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$", max_length=253)] | None = (
        None
    )
    """The name in the gateway's certificate. Default: the address's host."""
    site: Annotated[str, Field(pattern=PATTERN_OBJECT_NAME, max_length=253)] | None = None
    """The name of this site's HPCSite in that cluster. Default: the policy's ``site``."""
    proxy: ProxyUrl | None = None
    """An HTTP proxy (CONNECT) that leads there. Default: what ``https_proxy`` says. ``no_proxy`` holds."""

    def authority_file(self, tls_dir: Path) -> Path | None:
        """Return where the authority is read from; None: the public ones."""
        usual = tls_dir / GATEWAY_CA_FILE
        return self.ca or (usual if usual.exists() else None)

    def authority(self, tls_dir: Path) -> bytes | None:
        """In PEM; None: the public ones. Raises ``OSError``."""
        file = self.authority_file(tls_dir)
        return None if file is None else file.read_bytes()


class SlurmSettings(Part):
    """How to reach Slurm."""

    adapter: Literal["cli", "rest", "pyslurm"] = "cli"
    """Slurm's own programs, slurmrestd, or the Python module pyslurm."""
    rest: RestSettings | None = None
    pyslurm: PyslurmSettings = PyslurmSettings()
    bin_dir: AbsolutePath | None = None
    """Directory of sbatch and its siblings, where PATH does not lead to them."""
    conf: AbsolutePath | None = None
    """SLURM_CONF for them. Default: the bridge's own environment."""
    command_timeout_seconds: Annotated[float, Field(ge=0.5, le=600)] = 30.0
    poll_seconds: Annotated[float, Field(ge=0.1, le=60)] = 1.5
    """Pause between two looks at the queue while pools live."""
    absence_lookups: Annotated[int, Field(ge=2, le=100)] = 3
    """Healthy look-ups that must find nothing before a doubtful submission counts as not made."""
    absence_seconds: Annotated[float, Field(ge=1, le=86_400)] = 45.0
    """The time over which they must do so."""
    warning_seconds: Annotated[int, Field(ge=5, le=3600)] = 60
    """A task gets SIGTERM this long before its time limit."""

    @model_validator(mode="after")
    def _settings_of_the_adapter(self) -> Self:
        if self.adapter == "rest" and self.rest is None:
            raise ValueError("adapter: rest needs the settings rest")
        return self


class Policy(Part):
    """One HPC site."""

    site: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=63)]
    run_dir: AbsolutePath
    """On a file system that the nodes share, writable by the bridge's user; private directories of the pools."""
    journal: AbsolutePath | None = None
    """Default: journal.db in run_dir."""
    tls_dir: AbsolutePath
    """Holds ca.crt, tls.crt and tls.key of the bridge."""
    listen: Listen | None = None
    """Where operators dial the bridge. Default: port 7444 of all addresses; with gateways: nowhere."""
    gateways: Annotated[list[GatewaySettings], Field(max_length=16)] = []
    """Gateways that the bridge dials."""
    metrics_listen: Listen | None = "127.0.0.1:9090"
    """null: no metrics."""
    identities: Annotated[list[Identity], Field(min_length=1)]
    partitions: list[SlurmName] = []
    """Those that may be used; the first is the default. Empty: none may be named, and Slurm or a plug-in of the site
    chooses."""
    sbatch: SbatchOptions | None = None
    """What is added to the options of each job."""
    partition_sbatch: dict[SlurmName, SbatchOptions] = {}
    """The same for the jobs of one partition, in the place of the site's."""
    accounts: list[SlurmAccount] = []
    """Empty: no account may be named."""
    qos: list[SlurmName] = []
    """Empty: none may be named; without one Slurm takes its default."""
    environments: Annotated[dict[DnsLabel, Environment], Field(min_length=1)]
    data_sets: dict[DnsLabel, AbsolutePath] = {}
    code_files: bool = True
    """Whether files of the users' own (``task.code``) are laid into the clients' working directories."""
    env_denied: list[Line] = [
        "LD_*", "BASH_ENV", "BASH_FUNC_*", "ENV", "SHELLOPTS", "BASHOPTS", "IFS", "PS4", "SLURM_*", "SBATCH_*",
        "SRUN_*", "APPTAINER*", "SINGULARITY*", "CH_*",
    ]  # fmt: skip
    """Patterns of variables that a job must not set: they would act on the shell, the scheduler or the container."""
    limits: Limits = Limits()
    all_callers: AllCallers = AllCallers()
    """Caps over all identities together."""
    drain: Reason | None = None
    """Why nothing new is taken for now: pools that are asked for are refused with these words, those that wait in the
    bridge go on waiting, and those that are in Slurm end in their own time."""
    users: UserSettings | None = None
    """Needed where an identity names a local user."""
    relay: RelaySettings | None = None
    """Left out: pools that ask for it are denied."""
    slurm: SlurmSettings = SlurmSettings()
    retention_days: Annotated[float, Field(ge=1, le=3650)] = 30.0
    """How long a finished pool's logs and its place in the journal are kept."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        uris = [identity.uri for identity in self.identities]
        for number, identity in enumerate(self.identities):
            where = f"identities[{number}]"
            if uris.index(identity.uri) != number:
                raise ValueError(f"{where}.uri: {identity.uri!r} is listed twice")
            for field in ("accounts", "partitions", "qos", "environments", "data_sets"):
                for name in getattr(identity, field) or []:
                    if name not in getattr(self, field):
                        raise ValueError(f"{where}.{field}: {name!r} is not among the site's {field}")
            if identity.user is not None:
                self._local_users(f"{where}.user: {identity.user!r}")
        for name in self.partition_sbatch:
            if name not in self.partitions:
                raise ValueError(f"partition_sbatch.{name}: {name!r} is not among the site's partitions")
        self._own_options()
        return self

    def _own_options(self) -> None:
        """Refuses options that the adapter cannot ask for, or that sbatch refuses together."""
        places = self.option_places()
        for where, given in places.items():
            for name in LACKING[self.slurm.adapter]:
                if getattr(given, name) is not None:
                    raise ValueError(f"{where}.{name}: slurm.adapter: {self.slurm.adapter} cannot ask for it; cli can")
        hints = [where for where, given in places.items() if given.hint]
        threads = [where for where, given in places.items() if given.threads_per_core]
        if hints and threads:
            raise ValueError(f"{hints[0]}.hint: sbatch takes no hint beside {threads[0]}.threads_per_core; keep one")

    def option_places(self) -> dict[str, SbatchOptions]:
        """Return the places where options of the site's own stand, by the path of each."""
        places = {"sbatch": self.sbatch}
        places |= {f"partition_sbatch.{name}": given for name, given in self.partition_sbatch.items()}
        places |= {f"environments.{name}.sbatch": one.sbatch for name, one in self.environments.items()}
        places |= {f"identities[{number}].sbatch": one.sbatch for number, one in enumerate(self.identities)}
        return {where: given for where, given in places.items() if given is not None}

    def _local_users(self, which: str) -> None:
        if self.users is None:
            raise ValueError(f"{which} needs the settings users")
        if self.slurm.adapter != "cli":
            raise ValueError(
                f"{which} needs slurm.adapter: cli; with {self.slurm.adapter} jobs belong to the bridge's user"
            )
        for field in ("bin_dir", "conf"):
            path = getattr(self.slurm, field)
            if path is not None and PLAIN_PATH.fullmatch(str(path)) is None:
                raise ValueError(f"slurm.{field}: {str(path)!r} cannot stand in sudoers, which {which} needs")

    @property
    def inbound(self) -> str | None:
        """Where the bridge listens; None: it only dials out."""
        return self.listen or (None if self.gateways else f"0.0.0.0:{BRIDGE_PORT}")

    @property
    def status_path(self) -> Path:
        """Where the running bridge writes down what `isthmus-bridge status` shows."""
        return self.journal_path.with_name("status.json")

    @property
    def journal_path(self) -> Path:
        """Where the journal lies."""
        return self.journal or self.run_dir / "journal.db"


def load(path: Path) -> Policy:
    """Reads and checks a policy file. Raises :class:`PolicyError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        return parse(strict_yaml.read(text))
    except ValueError as error:
        raise PolicyError(f"{path}: {error}") from None


def schema() -> str:
    """The policy's JSON schema. What it cannot say (one field goes with another) only :func:`parse` checks."""
    content = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Policy.model_json_schema()}
    return json.dumps(content, indent=2) + "\n"


def parse(content: Any) -> Policy:
    """Checks a policy. Raises :class:`PolicyError`."""
    if not isinstance(content, dict):
        raise PolicyError("a policy is a mapping")
    try:
        return Policy.model_validate(content)
    except ValidationError as error:
        raise PolicyError("; ".join(_sentence(item) for item in error.errors())) from None


def _sentence(item: Any) -> str:
    path = ""
    for part in item["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if item["type"] == "missing":
        return f"{path}: is missing"
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown field"
    message = str(item["ctx"]["error"]) if item["type"] == "value_error" else item["msg"]
    return f"{path}: {message}" if path else message
