"""Removal of a lab, also of a crashed one: processes, mounts, cgroups, the namespace, the directory."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

from lab.machine import cgroups
from lab.machine.errors import LabError
from lab.machine.network import Network
from lab.machine.paths import Paths
from lab.machine.private_mounts import OVERLAID
from lab.machine.processes import end


def end_containers(paths: Paths, network: Network) -> None:
    """End the pods' processes and the shims that watch them."""
    address = str(paths.containerd_socket).encode()
    shims = [pid for pid in network.pids() if address in _read(pid, "cmdline").split(b"\0")]
    end([*shims, *cgroups.pids(paths.name)], grace=0)


def end_jobs(network: Network) -> None:
    """End the processes of Slurm jobs: a job's steps outlive their slurmd."""

    def of_a_job(pid: int) -> bool:
        return _read(pid, "cmdline").startswith(b"slurmstepd") or b"\0SLURM_JOB_ID=" in _read(pid, "environ")

    end([pid for pid in network.pids() if of_a_job(pid)], grace=0)


def end_everything(paths: Paths, network: Network) -> None:
    """End all processes in the lab's network and its pods, including `lab exec` sessions."""
    deadline = time.monotonic() + 120
    # Repeated, since a process may start another one before it is ended.
    while pids := [*network.pids(), *cgroups.pids(paths.name)]:
        if time.monotonic() > deadline:
            raise LabError(f"processes {pids} do not end; look at them with ps, then run `down` again")
        end(pids, grace=1)


def remove_cgroup(name: str) -> None:
    """Remove the pods' cgroup; the kernel needs a moment to release ended processes."""
    for attempt in range(600):
        try:
            cgroups.remove(name)
            return
        except OSError:
            if attempt == 599:
                raise
            time.sleep(0.1)


def unmount(root: Path) -> None:
    """Detach every mount under a directory in this mount namespace."""
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # Spaces and similar characters are octal escapes.
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split()[4]))
        if point.is_relative_to(root):
            points.append(point)
    for point in reversed(points):
        subprocess.run(["umount", "--lazy", point], check=True)


def remove_directory(paths: Paths) -> None:
    """Remove the directory if it is that of a lab."""
    if not paths.root.exists():
        return
    require_ours(paths)
    unmount(paths.root)
    shutil.rmtree(paths.root)


def require_usable(paths: Paths) -> None:
    """Refuse an unusable directory before anything is created."""
    require_ours(paths)
    for covered in OVERLAID:
        if paths.root.is_relative_to(Path(covered).resolve()):
            raise LabError(f"a lab cannot be below {covered}, which its daemons see replaced; give another --dir")
    for folder in paths.root.parents:
        if folder.exists() and not folder.stat().st_mode & 0o001:
            raise LabError(
                f"{folder} cannot be entered by other users, and Slurm jobs run unprivileged; give another --dir"
            )


def require_outside(network: Network) -> None:
    """Refuse to end the caller together with the lab."""
    if network.exists() and network.handle.samefile("/proc/self/ns/net"):
        raise LabError("this process runs inside the lab; leave `lab exec` first, then run `python -m lab down`")


def require_ours(paths: Paths) -> None:
    """Refuse a directory with other contents."""
    if paths.root.exists() and any(paths.root.iterdir()) and not paths.marker.exists():
        raise LabError(f"{paths.root} is not empty and not a lab's directory; give another one with --dir")


def _read(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return b""
