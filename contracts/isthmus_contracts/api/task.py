"""The training script in a FederatedJob: its image, command line, files and settings."""

from typing import Annotated

from pydantic import Field, field_validator

from ..identities import RESERVED_ENV_PREFIX
from .fields import Argument, EnvName, Image, ObjectName, Resource, Text, list_map


class EnvVar(Resource):
    """One environment variable of the training script."""

    name: EnvName
    """Name of the variable. Names that begin with ISTHMUS_ are reserved."""
    value: Text = ""
    """Value of the variable, used literally."""

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name.startswith(RESERVED_ENV_PREFIX):
            raise ValueError(f"names that begin with {RESERVED_ENV_PREFIX} are reserved for Isthmus")
        return name


class ConfigChange(Resource):
    """Settings that change during training."""

    from_round: Annotated[int, Field(ge=1, le=1_000_000)]
    """First round with these settings."""
    config: dict[str, Text]
    """Settings that replace those of the same name in task.config, until a later change."""


class ConfigMapRef(Resource):
    """Reference to a ConfigMap of the job's namespace."""

    name: ObjectName


class Code(Resource):
    """Small files, such as the training script itself."""

    config_map_ref: ConfigMapRef
    """ConfigMap with the files. They are copied when the job is accepted; later changes have no effect."""


class Task(Resource):
    """The training script. Cloud and HPC clients run the same one."""

    image: Image
    """OCI image of the cloud clients and, unless aggregator.image is set, of the aggregator. HPC clients run in an
    environment of the site."""
    command: Annotated[list[Argument], Field(min_length=1, max_length=128)]
    """The script's command line, as a list; no shell is involved."""
    env: Annotated[list[EnvVar], Field(max_length=128, json_schema_extra=list_map("name"))] = []
    """Environment variables of the script."""
    code: Code | None = None
    """Files that are copied into the working directory of every client and of the aggregator."""
    config: dict[str, Text] = {}
    """Settings that the script gets as rnd.config in every round."""
    config_changes: Annotated[list[ConfigChange], Field(max_length=256, json_schema_extra=list_map("fromRound"))] = []
    """Settings that change from a round on, such as a lower learning rate."""

    def config_of(self, round_number: int) -> dict[str, str]:
        """Return the settings of a round."""
        settings = dict(self.config)
        for change in sorted(self.config_changes, key=lambda change: change.from_round):
            if change.from_round <= round_number:
                settings |= change.config
        return settings

    @field_validator("config_changes")
    @classmethod
    def _one_a_round(cls, changes: list[ConfigChange]) -> list[ConfigChange]:
        rounds = [change.from_round for change in changes]
        if twice := next((number for number in rounds if rounds.count(number) > 1), None):
            raise ValueError(f"two changes begin in round {twice}; merge them into one")
        return changes
