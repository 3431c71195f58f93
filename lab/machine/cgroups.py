"""The cgroup of all pods of a lab, in every hierarchy of this machine."""

from __future__ import annotations

import os
from pathlib import Path

from lab.machine.errors import LabError

CGROUPS = Path("/sys/fs/cgroup")


def create(name: str) -> None:
    """Create the cgroup that the kubelet is configured to use for pods; the kubelet requires that it exists."""
    for hierarchy in _hierarchies():
        group = hierarchy / name
        group.mkdir(exist_ok=True)
        if hierarchy.name == "cpuset":
            # On version 1 a new cpuset is empty, and nothing can run in it.
            for setting in ("cpuset.cpus", "cpuset.mems"):
                (group / setting).write_text((hierarchy / setting).read_text())


def pids(name: str) -> list[int]:
    """Return all processes in the cgroup and below: those of the pods."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            memberships = (entry / "cgroup").read_text().splitlines()
        except OSError:
            continue
        locations = [f"{line.split(':', 2)[2]}/" for line in memberships]
        if any(location.startswith(f"/{name}/") for location in locations):
            found.append(int(entry.name))
    return found


def remove(name: str) -> None:
    """Remove the cgroup; its processes must have ended."""
    for hierarchy in _hierarchies():
        for folder, _, _ in os.walk(hierarchy / name, topdown=False):
            Path(folder).rmdir()


def _hierarchies() -> list[Path]:
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    found = [entry for entry in CGROUPS.iterdir() if entry.is_dir() and not entry.is_symlink()]
    if not found:
        raise LabError(f"no cgroups at {CGROUPS}; mount them (in a container: run it privileged)")
    return found
