"""The model of the site's policy file, and its parser. Decisions are in :mod:`.authorization`."""

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
from .privacy import PrivacyRules

# In tls_dir, beside the bridge's own certificate.
GATEWAY_CA_FILE = "gateway-ca.crt"
PLACEHOLDERS = ("tls_dir", "work_dir", "data", "image")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


class PolicyError(ValueError):
    """The policy file cannot be used. ``str()`` is one line with every error."""


class Identity(Part):
    """A caller, and its permissions."""

    uri: IdentityUri
    """The URI in the caller's certificate."""
    accounts: list[SlurmAccount] | None = None
    """Slurm accounts of this caller; the first is the default. Default: the site's."""
    namespaces: list[Line] = ["*"]
    """Patterns (``*``, ``?``) of the Kubernetes namespaces whose jobs are accepted."""
    partitions: list[SlurmName] | None = None
    """Partitions that this caller may use. Default: the site's, also for the following fields."""
    qos: list[SlurmName] | None = None
    environments: list[DnsLabel] | None = None
    data_sets: list[DnsLabel] | None = None
    code_files: bool | None = None
    limits: Limits | None = None
    """Each limit that is set here replaces the site's for this caller."""
    sbatch: SbatchOptions | None = None
    """Options for its jobs. They override those of the environment, the partition and the site."""
    drain: Reason | None = None
    """Why no new pools are accepted from this caller; see the site's ``drain``."""
    user: UserName | None = None
    """The local user who owns this caller's jobs and their files; see ``users``. Default: the user who runs the
    bridge."""


class Inside(Part):
    """Paths inside the container of the directories that its prefix binds."""

    tls_dir: AbsolutePath | None = None
    work_dir: AbsolutePath | None = None
    data: AbsolutePath | None = None


class Environment(Part):
    """One way to run the script: exactly one of venv, modules (with or without a venv), apptainer and prefix."""

    venv: AbsolutePath | None = None
    modules: list[Line] = []
    apptainer: AbsolutePath | None = None
    options: list[Line] = []
    """Options of ``apptainer exec``, such as ``--nv`` or more binds."""
    prefix: list[Line] = []
    """Arguments before the script's command line. They may contain {tls_dir}, {work_dir}, {data} and {image}; an
    argument with {data} is left out if the pool has no data set."""
    images: list[Line] = []
    """Patterns of the images allowed for {image}."""
    inside: Inside = Inside()
    setup: list[Line] = []
    """Lines of bash, run before the script; the first that fails ends the task."""
    env: dict[EnvName, Value] = {}
    sbatch: SbatchOptions | None = None
    """Options for jobs with this environment. They override those of the partition and the site."""
    env_denied: list[Line] = []
    """Patterns of variables that a job must not set in this environment, in addition to the site's ``env_denied``."""

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
            raise ValueError("venv can be combined with modules only")
        if self.options and not self.apptainer:
            raise ValueError("options needs apptainer")
        if self.inside != Inside() and not self.prefix:
            raise ValueError("inside needs prefix")
        names = {name for argument in self.prefix for name in _PLACEHOLDER.findall(argument)}
        if unknown := sorted(names - set(PLACEHOLDERS)):
            raise ValueError(f"prefix: unknown placeholder {{{unknown[0]}}}; use {', '.join(PLACEHOLDERS)}")
        if self.prefix and _PLACEHOLDER.search(self.prefix[0]):
            raise ValueError("prefix: the program itself must not be a placeholder")
        if ("image" in names) != bool(self.images):
            raise ValueError(
                "a prefix with {image} needs images, the patterns allowed for it; other prefixes take none"
            )
        if reserved := [name for name in self.env if name.startswith(RESERVED_ENV_PREFIX)]:
            raise ValueError(f"env.{reserved[0]}: names that begin with {RESERVED_ENV_PREFIX} are reserved")
        return self

    @property
    def runs_image(self) -> bool:
        """True if the job's own image is run."""
        return bool(self.images)


class UserSettings(Part):
    """Submission as other local users: through sudo, with the rule that `isthmus-bridge sudoers` prints."""

    run_dir: Annotated[Path, AfterValidator(absolute), AfterValidator(of_each_user)]
    """Directory of a local user's pools, with {user} in place of the name; shared with the nodes. The bridge creates it
    as that user, with mode 0700."""
    sudo: AbsolutePath = Path("/usr/bin/sudo")
    operator: bool = False
    """True if the bridge's user is a Slurm operator, who sees other users' jobs even if PrivateData hides them."""


class RelaySettings(Part):
    """Relay of the clients' TLS connections to aggregators that the compute nodes cannot reach."""

    listen: Listen
    """Address at which the relay listens for the compute nodes."""
    address: Listen
    """Address (host:port) at which the compute nodes dial the relay."""
    destinations: Annotated[list[Line], Field(min_length=1)]
    """Patterns (``*``, ``?``) of the aggregators' host:port that the relay may dial. A numeric pattern (10.1.*:7443)
    matches addresses only, no names; a pattern of IPv6 addresses has brackets ([2001:db8::*]:7443)."""
    connections: Annotated[int, Field(ge=1, le=100_000)] = 4096
    """Maximum of open connections of all pools together, as far as the limit of open files allows: each takes two. A
    pool may have two for each client, and eight more."""


class RestSettings(Part):
    """Settings of the ``rest`` adapter (slurmrestd)."""

    url: Annotated[str, Field(max_length=1024), AfterValidator(rest_url)]
    """``unix:/path/of/its/socket``, ``https://host:port``, or ``http://localhost:port`` on the same machine."""
    ca_file: AbsolutePath | None = None
    """CA certificates (PEM) of an https server. Default: the system's."""
    token_file: AbsolutePath | None = None
    """A file with the token (JWT) of the bridge's user, read at every request; it must be renewed by other means."""
    token_command: list[Line] = []
    """Instead of token_file: a program that prints a token, with its arguments: [scontrol, token, lifespan=3600]. Run
    when a new token is needed."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.token_file) == bool(self.token_command):
            raise ValueError("needs exactly one of token_file and token_command")
        return self


class PyslurmSettings(Part):
    """Settings of the ``pyslurm`` adapter."""

    python: AbsolutePath | None = None
    """The Python that has pyslurm. Default: the bridge's own."""


class GatewaySettings(Part):
    """An operator's gateway, which the bridge dials because operators cannot dial the bridge."""

    address: Listen
    """Address of the gateway, host:port."""
    ca: AbsolutePath | None = None
    """File with the CA of the gateway's certificate, in PEM. Default: gateway-ca.crt in tls_dir if it exists, otherwise
    the public CAs."""
    server_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$", max_length=253)] | None = (
        None
    )
    """The name in the gateway's certificate. Default: the address's host."""
    site: Annotated[str, Field(pattern=PATTERN_OBJECT_NAME, max_length=253)] | None = None
    """The name of this site's HPCSite in that cluster. Default: the policy's ``site``."""
    proxy: ProxyUrl | None = None
    """HTTP proxy (CONNECT) to the gateway. Default: ``https_proxy`` of the environment. ``no_proxy`` applies."""

    def authority_file(self, tls_dir: Path) -> Path | None:
        """Return the file of the CA; ``None`` for the public CAs."""
        usual = tls_dir / GATEWAY_CA_FILE
        return self.ca or (usual if usual.exists() else None)

    def authority(self, tls_dir: Path) -> bytes | None:
        """Return the CA in PEM; ``None`` for the public CAs. Raises ``OSError``."""
        file = self.authority_file(tls_dir)
        return None if file is None else file.read_bytes()


class SlurmSettings(Part):
    """Access to Slurm."""

    adapter: Literal["cli", "rest", "pyslurm"] = "cli"
    """Slurm's own programs, slurmrestd, or the Python module pyslurm."""
    rest: RestSettings | None = None
    pyslurm: PyslurmSettings = PyslurmSettings()
    bin_dir: AbsolutePath | None = None
    """Directory of Slurm's programs, if they are not in PATH."""
    conf: AbsolutePath | None = None
    """SLURM_CONF for Slurm's programs. Default: that of the bridge's environment."""
    command_timeout_seconds: Annotated[float, Field(ge=0.5, le=600)] = 30.0
    poll_seconds: Annotated[float, Field(ge=0.1, le=60)] = 1.5
    """Interval of polling the queue while there are live pools."""
    absence_lookups: Annotated[int, Field(ge=2, le=100)] = 3
    """Successful look-ups that must find nothing before an ambiguous submission counts as not made."""
    absence_seconds: Annotated[float, Field(ge=1, le=86_400)] = 45.0
    """Time over which these look-ups must find nothing."""
    warning_seconds: Annotated[int, Field(ge=5, le=3600)] = 60
    """Seconds before its time limit at which a task gets SIGTERM."""

    @model_validator(mode="after")
    def _settings_of_the_adapter(self) -> Self:
        if self.adapter == "rest" and self.rest is None:
            raise ValueError("adapter: rest needs the settings rest")
        return self


class Policy(Part):
    """One HPC site."""

    site: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=63)]
    run_dir: AbsolutePath
    """Parent of the pools' private directories, on a file system shared with the nodes, writable by the bridge's
    user."""
    journal: AbsolutePath | None = None
    """Path of the journal. Default: journal.db in run_dir."""
    tls_dir: AbsolutePath
    """Directory of the bridge's ca.crt, tls.crt and tls.key."""
    listen: Listen | None = None
    """Address at which the bridge listens for operators. Default: port 7444 of all addresses; with gateways: none."""
    gateways: Annotated[list[GatewaySettings], Field(max_length=16)] = []
    """Gateways that the bridge dials."""
    metrics_listen: Listen | None = "127.0.0.1:9090"
    """Address of the metrics; null for none."""
    identities: Annotated[list[Identity], Field(min_length=1)]
    partitions: list[SlurmName] = []
    """Partitions that may be used; the first is the default. If empty, none may be named, and Slurm or a plug-in of the
    site chooses."""
    sbatch: SbatchOptions | None = None
    """Options that are added to each job."""
    partition_sbatch: dict[SlurmName, SbatchOptions] = {}
    """Options for the jobs of one partition. They override those of the site."""
    accounts: list[SlurmAccount] = []
    """Accounts that may be charged; the first is the default. If empty, none may be named."""
    qos: list[SlurmName] = []
    """QOS that may be named. If empty, none may be named, and Slurm uses its default."""
    environments: Annotated[dict[DnsLabel, Environment], Field(min_length=1)]
    data_sets: dict[DnsLabel, AbsolutePath] = {}
    code_files: bool = True
    """True if files of the users (``task.code``) are copied into the clients' working directories."""
    env_denied: list[Line] = [
        "LD_*", "BASH_ENV", "BASH_FUNC_*", "ENV", "SHELLOPTS", "BASHOPTS", "IFS", "PS4", "SLURM_*", "SBATCH_*",
        "SRUN_*", "APPTAINER*", "SINGULARITY*", "CH_*",
    ]  # fmt: skip
    """Patterns of variables that a job must not set, since they affect the shell, the scheduler or the container."""
    limits: Limits = Limits()
    all_callers: AllCallers = AllCallers()
    """Limits of all identities together."""
    drain: Reason | None = None
    """Why no new pools are accepted for now. New requests are refused with this reason, pools that wait in the bridge
    keep waiting, and pools in Slurm run to their end."""
    users: UserSettings | None = None
    """Required if an identity names a local user."""
    privacy: PrivacyRules = PrivacyRules()
    """Protection that jobs must have, and what may run here and leave the site."""
    audit_log: AbsolutePath | None = None
    """Path of the audit log, to which the bridge only appends. Default: audit.jsonl beside the journal."""
    relay: RelaySettings | None = None
    """If left out, pools that need the relay are denied."""
    slurm: SlurmSettings = SlurmSettings()
    retention_days: Annotated[float, Field(ge=1, le=3650)] = 30.0
    """Time for which a finished pool's logs and its journal entry are kept."""

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
        """Refuse options that the adapter does not support, or that sbatch does not accept together."""
        places = self.option_places()
        for where, given in places.items():
            for name in LACKING[self.slurm.adapter]:
                if getattr(given, name) is not None:
                    raise ValueError(
                        f"{where}.{name}: slurm.adapter: {self.slurm.adapter} does not support it; cli does"
                    )
        hints = [where for where, given in places.items() if given.hint]
        threads = [where for where, given in places.items() if given.threads_per_core]
        if hints and threads:
            raise ValueError(
                f"{hints[0]}.hint: sbatch does not accept hint with {threads[0]}.threads_per_core; keep one"
            )

    def option_places(self) -> dict[str, SbatchOptions]:
        """Return all options of the site, by their path in the policy."""
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
                raise ValueError(f"slurm.{field}: {str(path)!r} cannot be used in sudoers, which {which} needs")

    @property
    def inbound(self) -> str | None:
        """The address at which the bridge listens; ``None`` if it only dials out."""
        return self.listen or (None if self.gateways else f"0.0.0.0:{BRIDGE_PORT}")

    @property
    def status_path(self) -> Path:
        """The file that the running bridge writes for `isthmus-bridge status`."""
        return self.journal_path.with_name("status.json")

    @property
    def audit_path(self) -> Path:
        """The path of the audit log."""
        return self.audit_log or self.journal_path.with_name("audit.jsonl")

    @property
    def journal_path(self) -> Path:
        """The path of the journal."""
        return self.journal or self.run_dir / "journal.db"


def load(path: Path) -> Policy:
    """Read and check a policy file. Raises :class:`PolicyError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        return parse(strict_yaml.read(text))
    except ValueError as error:
        raise PolicyError(f"{path}: {error}") from None


def schema() -> str:
    """Return the policy's JSON schema. Relations between fields are checked by :func:`parse` only."""
    content = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Policy.model_json_schema()}
    return json.dumps(content, indent=2) + "\n"


def parse(content: Any) -> Policy:
    """Check a policy and return it. Raises :class:`PolicyError`."""
    if not isinstance(content, dict):
        raise PolicyError("the policy must be a mapping")
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
