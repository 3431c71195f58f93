"""Paths of a lab. This module does not access the disk."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

# Not under a home: Slurm jobs are unprivileged and must be able to enter every parent directory.
DEFAULT_DIRECTORY = Path("/var/tmp/isthmus-lab")  # noqa: S108
DEFAULT_NAME = "isthmus-lab"


def cache_directory() -> Path:
    """Return the directory of downloads and locks, shared by all labs of this user and kept by `down`."""
    configured = os.environ.get("ISTHMUS_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "isthmus"


def builds_directory() -> Path:
    """Return the directory for results of long builds: the cache, or the directory in ISTHMUS_BUILDS."""
    configured = os.environ.get("ISTHMUS_BUILDS")
    return Path(configured) if configured else cache_directory()


@dataclass(frozen=True)
class Paths:
    """Layout of a lab's directory."""

    root: Path

    @classmethod
    def of(cls, directory: str | os.PathLike[str] | None = None) -> Paths:
        """Return the lab at a directory; by default that of this process (`lab exec`), or else the default one."""
        return cls(Path(os.path.realpath(directory or os.environ.get("ISTHMUS_LAB") or DEFAULT_DIRECTORY)))

    @property
    def name(self) -> str:
        """Name of the namespace and the cgroup, unique for each directory, so that several labs can run."""
        if self.root == DEFAULT_DIRECTORY:
            return DEFAULT_NAME
        return f"{DEFAULT_NAME}-{hashlib.sha256(str(self.root).encode()).hexdigest()[:8]}"

    @property
    def marker(self) -> Path:
        """Marker file of a lab's directory: `down` removes only directories that have one."""
        return self.root / ".isthmus-lab"

    @property
    def bin(self) -> Path:
        return self.root / "bin"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def home(self) -> Path:
        """Home of the lab's unprivileged user."""
        return self.root / "home"

    @property
    def volumes(self) -> Path:
        """Directories of the PersistentVolumes."""
        return self.root / "volumes"

    @property
    def kubeconfig(self) -> Path:
        return self.root / "kubeconfig"

    @property
    def kubernetes(self) -> Path:
        """Certificates, configuration and state of Kubernetes."""
        return self.root / "kubernetes"

    @property
    def containerd_socket(self) -> Path:
        return self.run / "containerd.sock"

    @property
    def slurm(self) -> Path:
        """Configuration and state of Slurm."""
        return self.root / "slurm"

    @property
    def slurm_conf(self) -> Path:
        return self.slurm / "slurm.conf"

    @property
    def slurmrestd_socket(self) -> Path:
        return self.slurm / "rest" / "slurmrestd.sock"

    @property
    def user_python(self) -> Path:
        """Virtual environment for the lab's user if it cannot read that of the caller."""
        return self.root / "python"

    @property
    def user_state(self) -> Path:
        """Caches that kubectl and helm would otherwise write to the caller's home."""
        return self.root / "user-state"
