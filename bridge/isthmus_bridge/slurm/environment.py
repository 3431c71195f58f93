"""The environment of a job: a short one that the bridge makes, with nothing of the bridge's own in it."""

import os
import pwd
from collections.abc import Mapping
from pathlib import Path

DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"


def user_name(outer: Mapping[str, str]) -> str:
    """The name of the user who owns the jobs: the one who runs the bridge."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container that knows the user by number only
        return outer.get("USER", str(os.getuid()))


def job_environment(path: str, outer: Mapping[str, str]) -> dict[str, str]:
    """What every job has, whichever way it is submitted."""
    try:
        home = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        home = outer.get("HOME", "/")
    name = user_name(outer)
    return {"PATH": path, "HOME": home, "USER": name, "LOGNAME": name, "SHELL": "/bin/bash", "LANG": "C.UTF-8"}


def program_environment(path: str, outer: Mapping[str, str], bin_dir: Path | None, conf: Path | None) -> dict[str, str]:
    """The same for Slurm's own programs: ``bin_dir`` comes first, and they learn which cluster is meant."""
    env = job_environment(f"{bin_dir}:{path}" if bin_dir else path, outer)
    if conf is not None or "SLURM_CONF" in outer:
        env["SLURM_CONF"] = str(conf) if conf is not None else outer["SLURM_CONF"]
    return env
