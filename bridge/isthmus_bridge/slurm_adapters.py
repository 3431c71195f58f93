"""Creation of the Slurm adapter that the policy selects."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import assert_never

from isthmus_contracts.identities import slurm_job_name

from .policy.policy import Policy, RestSettings, SlurmSettings
from .slurm.cli import CliAdapter
from .slurm.command import CommandOutputTooLong, CommandTimeout, run
from .slurm.environment import DEFAULT_PATH, program_environment
from .slurm.model import SlurmAdapter, SlurmError
from .slurm.pyslurm.adapter import PyslurmAdapter
from .slurm.rest import http
from .slurm.rest.adapter import RestAdapter
from .slurm.rest.token import TokenCommand, TokenFile
from .users.helper_client import AsUser

Observer = Callable[[str, float, bool], None]
_MAX_TOKEN_OUTPUT = 1 << 16


def _unobserved(program: str, seconds: float, good: bool) -> None:
    pass


def slurm_adapter(policy: Policy, observer: Observer = _unobserved) -> SlurmAdapter:
    """Return the adapter that the policy selects."""
    match policy.slurm.adapter:
        case "cli":
            return cli(policy.slurm, observer, policy)
        case "rest":
            assert policy.slurm.rest is not None
            return rest(policy.slurm, policy.slurm.rest, observer)
        case "pyslurm":
            return pyslurm(policy.slurm, observer)
        case other:
            assert_never(other)


def cli(slurm: SlurmSettings, observer: Observer = _unobserved, policy: Policy | None = None) -> CliAdapter:
    """Return the adapter for Slurm's programs. ``policy``: needed to submit as other users."""
    users = policy.users if policy is not None else None
    return CliAdapter(
        bin_dir=slurm.bin_dir, conf=slurm.conf, timeout=slurm.command_timeout_seconds,
        observer=observer, delegate=AsUser(policy) if policy is not None and users is not None else None,
        operator=users is not None and users.operator,
    )  # fmt: skip


def rest(slurm: SlurmSettings, settings: RestSettings, observer: Observer = _unobserved) -> RestAdapter:
    """Return the adapter for slurmrestd."""
    token: TokenFile | TokenCommand
    if settings.token_file is not None:
        token = TokenFile(settings.token_file)
    else:
        token = TokenCommand(settings.token_command, _token_runner(slurm, os.environ))
    return RestAdapter(
        slurm_job_name(""), http.endpoint(settings.url), token, ca_file=settings.ca_file,
        timeout=slurm.command_timeout_seconds, observer=observer,
    )  # fmt: skip


def pyslurm(slurm: SlurmSettings, observer: Observer = _unobserved) -> PyslurmAdapter:
    """Return the adapter for pyslurm."""
    return PyslurmAdapter(
        cli(slurm, observer).cancel, python=slurm.pyslurm.python, conf=slurm.conf,
        timeout=slurm.command_timeout_seconds, observer=observer,
    )  # fmt: skip


def _token_runner(slurm: SlurmSettings, outer: Mapping[str, str]) -> Callable[[Sequence[str]], str]:
    env = program_environment(outer.get("PATH", DEFAULT_PATH), outer, slurm.bin_dir, slurm.conf)

    def ask(argv: Sequence[str]) -> str:
        try:
            result = run(argv, env=env, timeout=slurm.command_timeout_seconds, max_output=_MAX_TOKEN_OUTPUT)
        except (CommandTimeout, CommandOutputTooLong) as error:
            raise SlurmError(f"token: {error}") from None
        except OSError as error:
            raise SlurmError(f"token: {argv[0]}: {error.strerror}") from None
        if result.status:
            lines = [line.strip() for line in result.errors.splitlines() if line.strip()]
            raise SlurmError(f"token: {argv[0]} failed: {lines[-1][:400] if lines else f'exit code {result.status}'}")
        return result.output

    return ask
