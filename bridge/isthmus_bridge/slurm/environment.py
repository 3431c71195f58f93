"""The environment of jobs and of Slurm's programs: a short one, with nothing of the bridge's own environment."""

import os
import pwd
from collections.abc import Mapping
from pathlib import Path

DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"


def user_name(outer: Mapping[str, str]) -> str:
    """Return the name of the user who runs the bridge, and owns its jobs."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container without an entry for the uid
        return outer.get("USER", str(os.getuid()))


def job_environment(path: str, outer: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of every job, whatever the adapter."""
    try:
        home = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        home = outer.get("HOME", "/")
    name = user_name(outer)
    return {"PATH": path, "HOME": home, "USER": name, "LOGNAME": name, "SHELL": "/bin/bash", "LANG": "C.UTF-8"}


def program_environment(path: str, outer: Mapping[str, str], bin_dir: Path | None, conf: Path | None) -> dict[str, str]:
    """Return the environment of Slurm's programs, with ``bin_dir`` first in PATH, and SLURM_CONF for ``conf``."""
    env = job_environment(f"{bin_dir}:{path}" if bin_dir else path, outer)
    if conf is not None or "SLURM_CONF" in outer:
        env["SLURM_CONF"] = str(conf) if conf is not None else outer["SLURM_CONF"]
    return env
