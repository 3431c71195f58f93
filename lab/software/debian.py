"""Debian packages that the lab and the other tests use, and their installation with apt."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from lab.machine.errors import LabError, say
from lab.machine.processes import end

BASE = ("iproute2", "util-linux", "procps")
KUBERNETES = (
    "etcd-server",
    "containerd",
    "runc",
    "containernetworking-plugins",
    "iptables",
    "conntrack",
    "gcc",  # the pause image's program
    "libc6-dev",
)
SLURM = ("munge", "slurmctld", "slurmd", "slurmrestd", "slurm-wlm-jwt-plugin", "slurm-client")
# Needed once, where Kubernetes' server binaries are not in the cache.
KUBERNETES_BUILD = ("golang-1.19-go", "golang-github-modern-go-reflect2-dev", "rsync", "dpkg-dev", "make")
# Programs that tests outside the lab use.
TOOLS = (
    "curl",
    "faketime",
    "git",  # earlier charts, and the hook for commit messages
    "liblua5.1-0",  # runs the health checks for Argo CD
    "prometheus",  # promtool
    "shellcheck",
    "sudo",  # visudo; also for a bridge that runs jobs as local users
)
# Used by other parts of the project: images, data.
COMPANIONS = ("buildah", "debootstrap", "charliecloud", "dataset-fashion-mnist")

# Daemons that the packages start on an ordinary system. The lab runs its own instead.
PACKAGED_DAEMONS = {
    "etcd": "etcd",
    "containerd": "containerd",
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurmrestd": "slurmrestd",
    "prometheus": "prometheus",
    "prometheus-node-exporter": "prometheus-node-exporter",
}

LOCK_PATIENCE = "DPkg::Lock::Timeout=300"
SUPPORTED = "12"
# Suite on which only Slurm runs; see lab/roots/newer_slurm.py.
SUPPORTED_FOR_SLURM = "forky"


def require_debian(slurm_only: bool = False) -> None:
    """Raise LabError, with a way out, on a system that the recipes below do not support."""
    release: dict[str, str] = {}
    try:
        for line in Path("/etc/os-release").read_text().splitlines():
            key, _, value = line.partition("=")
            release[key] = value.strip('"')
    except FileNotFoundError:
        pass
    if slurm_only and (release.get("ID"), release.get("VERSION_CODENAME")) == ("debian", SUPPORTED_FOR_SLURM):
        return
    if (release.get("ID"), release.get("VERSION_ID")) != ("debian", SUPPORTED):
        found = release.get("PRETTY_NAME", "an unknown system")
        raise LabError(
            f"the lab needs Debian {SUPPORTED} (bookworm), this is {found}; use a Debian {SUPPORTED} machine or VM"
        )


def require_root(what: str) -> None:
    if os.geteuid() != 0:
        raise LabError(f"{what} needs root (network namespaces, mounts, apt); run it again as root or with sudo -E")


def architecture() -> str:
    """Return Debian's name of this machine's architecture; container images and Go use the same name."""
    return subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True).stdout.strip()


def missing(packages: Iterable[str]) -> list[str]:
    """Return the packages that are not installed."""
    wanted = list(packages)
    query = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Abbrev}\n", *wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    installed = {line.split()[0] for line in query.stdout.splitlines() if line.split()[1:] == ["ii"]}
    return [name for name in wanted if name not in installed]


def install_if_allowed(packages: Iterable[str]) -> None:
    """Install missing packages; without root or apt, print them and continue."""
    has_apt = shutil.which("apt-get") is not None
    if has_apt and os.geteuid() == 0:
        install(packages)
    elif not has_apt:
        say(f"this is not Debian: install the equivalents of {' '.join(packages)}; without them some tests skip")
    elif wanted := missing(packages):
        say(f"not installed, so some tests skip; as root: apt-get install {' '.join(wanted)}")


def install(packages: Iterable[str]) -> None:
    """Install missing packages, and stop the daemons that apt started."""
    wanted = missing(packages)
    if not wanted:
        return
    require_root("installing packages")
    say(f"installing {len(wanted)} Debian packages: {' '.join(wanted)}")
    before = _packaged_daemons_running()
    if not _known_to_apt(wanted):
        apt(["update"])
    apt(["install", "--yes", "--no-install-recommends", *wanted])
    _end_new_daemons(before)


def apt(arguments: Sequence[str], options: Iterable[str] = (), cwd: Path | None = None) -> None:
    """Run apt-get quietly; show the end of its output if it fails."""
    settings = [word for option in (LOCK_PATIENCE, *options) for word in ("-o", option)]
    # invoke-rc.d starts nothing in runlevel 1; a systemd host ignores that, hence _end_new_daemons.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    command = ["apt-get", "-q", *settings, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd, check=False)
    if result.returncode:
        words = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        raise LabError(f"apt-get {arguments[0]} failed: " + " / ".join(words[-3:]))


def extract(package: str, member: str, target: Path) -> None:
    """Take one file out of a package without installing it (it may conflict with what is installed)."""
    with tempfile.TemporaryDirectory() as scratch:
        # apt drops to its own user for downloads, which must be able to write here.
        Path(scratch).chmod(0o755)
        if not _known_to_apt([package]):
            apt(["update"])
        apt(["download", package], options=["APT::Sandbox::User=root"], cwd=Path(scratch))
        archive = next(Path(scratch).glob("*.deb"))
        subprocess.run(["dpkg-deb", "--extract", archive, f"{scratch}/tree"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(f"{scratch}/tree/{member}", target)


def _known_to_apt(packages: Sequence[str]) -> bool:
    shown = subprocess.run(["apt-cache", "show", *packages], capture_output=True, check=False)
    return shown.returncode == 0


def _packaged_daemons_running() -> dict[int, str]:
    """Return the running daemons that init scripts of the packages may have started, by pid."""
    found: dict[int, str] = {}
    ours = Path("/proc/self/ns/net").readlink()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            program = (entry / "exe").readlink().name
            namespace = (entry / "ns/net").readlink()
        except OSError:
            continue
        # Daemons of a lab are in a different namespace.
        if program in PACKAGED_DAEMONS and namespace == ours:
            found[int(entry.name)] = program
    return found


def _end_new_daemons(before: dict[int, str]) -> None:
    started = {pid: program for pid, program in _packaged_daemons_running().items() if pid not in before}
    if not started:
        return
    if Path("/run/systemd/system").exists():
        units = sorted({PACKAGED_DAEMONS[program] for program in started.values()})
        say(f"stopping the daemons that apt started: {' '.join(units)}")
        subprocess.run(["systemctl", "disable", "--now", "--quiet", *units], check=False)
    end([pid for pid in _packaged_daemons_running() if pid not in before])
