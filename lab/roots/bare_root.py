"""Bare roots of Debian suites, which stand for a fresh machine with the suite's own Python and packages.

A root is a directory made by debootstrap and entered in new namespaces. Processes that a command starts in it end
with the command. The configuration with which pip and apt reach their servers is copied from this machine.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.machine.errors import LabError, say
from lab.software import cache, debian
from tools.image_builder.host import pip_settings
from tools.image_builder.local_base import mirror

SUITES = ("bookworm", "trixie", "forky")
# Packages that README.md requires; python3-venv is separate in Debian.
PACKAGES = ("python3", "make", "ca-certificates")
RECIPE = 1  # increase when a change below affects a base
SCRIPTS = Path("/usr/share/debootstrap/scripts")
FORWARDED = ("OMP_NUM_THREADS", "DEBIAN_MIRROR", "ISTHMUS_BUILDS")
# Arguments: the root $1, its lower directory $2 (if not empty, changes stay in memory), the number $3 of directories to
# mount, those directories, the command. The root becomes a mount and the root of the namespace: a lab in it creates
# network namespaces, and Slurm's jobs create user namespaces, which chroot forbids.
ENTER = """
set -e
root=$1; lower=$2; shown=$3; shift 3
if [ -n "$lower" ]; then
  mount -t tmpfs tmpfs "$root"
  mkdir "$root/upper" "$root/work" "$root/root"
  mount -t overlay overlay -o "lowerdir=$lower,upperdir=$root/upper,workdir=$root/work" "$root/root"
  root=$root/root
fi
mount --bind "$root" "$root"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/run"
while [ "$shown" -gt 0 ]; do
  mkdir -p "$root$1"
  mount --bind "$1" "$root$1"
  shift; shown=$((shown - 1))
done
cd "$root"
pivot_root . .
umount -l .
cd /
exec "$@"
"""


@dataclass(frozen=True)
class Root:
    """Root file system on disk."""

    path: Path
    shown: tuple[Path, ...] = ()
    """Directories of this machine that are seen in it, at the same place."""
    lower: Path | None = None
    """The root that is meant, where nothing may be changed in it; ``path`` is then an empty directory."""

    def run(self, argv: Sequence[str], user: str = "root", cwd: str = "/", env: dict[str, str] | None = None) -> int:
        """Run a command in the root and return its exit status. Processes that it started end with it."""
        home = "/root" if user == "root" else f"/home/{user}"
        variables = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": home, "USER": user,
            "LOGNAME": user, "DEBIAN_FRONTEND": "noninteractive", **_network(), **(env or {}),
        }  # fmt: skip
        # setpriv is in every root, since its package is essential; su would need a PAM session.
        drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if user != "root" else []
        inner = [*drop, "env", "-i", f"--chdir={cwd}", *(f"{name}={value}" for name, value in variables.items()), *argv]
        outer = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--ipc"]
        roots = [str(self.path), str(self.lower or "")]
        shell = ["sh", "-c", ENTER, "enter", *roots, str(len(self.shown)), *map(str, self.shown)]
        return subprocess.run([*outer, *shell, *inner], check=False).returncode

    def ensure(
        self, argv: Sequence[str], user: str = "root", cwd: str = "/", env: dict[str, str] | None = None
    ) -> None:
        """Run a command that must succeed; raise LabError otherwise."""
        if code := self.run(argv, user, cwd, env):
            raise LabError(f"{self.path.name}: `{' '.join(argv)}` ended with {code} as {user}")


def base(suite: str, packages: Sequence[str] = PACKAGES) -> Path:
    """Return a root of the suite with only these packages, made once with debootstrap."""
    debian.require_root("making a root")
    debian.install(["debootstrap"])

    def make(target: Path) -> None:
        source = mirror()
        say(f"making a Debian {suite} root (a minute or two, once)")
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", suite, str(target), source]
        if not (SCRIPTS / suite).exists():
            command.append(str(SCRIPTS / "sid"))  # a suite that is newer than this debootstrap
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            words = (done.stdout + done.stderr).strip().splitlines()[-5:]
            raise LabError(f"debootstrap {suite} failed: " + " / ".join(words))

    return cache.build(f"root-{suite}-{RECIPE}", make)


@contextmanager
def fresh(suite: str, directory: Path) -> Iterator[Root]:
    """Yield a new copy of a suite's root in which pip and apt work; remove it at the end."""
    path = directory / suite
    remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", "--reflink=auto", base(suite), path], check=True)
    try:
        yield prepare(path)
    finally:
        remove(path)


def prepare(path: Path) -> Root:
    """Copy the configuration of pip, apt and the resolver to a root."""
    path.chmod(0o755)
    for name in ("resolv.conf", "hosts"):
        shutil.copy(f"/etc/{name}", path / "etc" / name)
    name = socket.gethostname()
    with (path / "etc/hosts").open("a") as hosts:
        hosts.write(f"127.0.0.1 localhost {name}\n")
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout.splitlines()
    kept = [line for line in dump if line.startswith(("Acquire::Check-", "Acquire::http", "Acquire::https"))]
    (path / "etc/apt/apt.conf.d/99-of-this-machine").write_text("".join(f"{line}\n" for line in kept))
    settings = pip_settings()
    lines = [f"{key} = {' '.join(value.split())}" for key, value in settings.items()]
    (path / "etc/pip.conf").write_text("[global]\n" + "".join(f"{line}\n" for line in lines))
    (path / "etc/pip.conf").chmod(0o644)
    # Results of long builds, if they are kept outside the cache.
    shown = [Path(builds)] if (builds := os.environ.get("ISTHMUS_BUILDS")) else []
    certificates = [value for name, value in _network().items() if name.endswith(("_FILE", "_BUNDLE"))]
    for word in {word for value in (*settings.values(), *certificates) for word in value.split()}:
        local = Path(word.removeprefix("file://"))
        if local.is_absolute() and local.is_file():
            (path / local.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(local, path / local.relative_to("/"))
        elif local.is_absolute() and local.is_dir():
            # The pages of an index link to files beside them.
            shown.append(local.parent if local.name == "simple" else local)
    return Root(path, tuple(sorted(shown)))


def remove(path: Path) -> None:
    """Remove a root; nothing is mounted there, since mounts end with the namespace of the command that made them."""
    if path.exists():
        shutil.rmtree(path)


def _network() -> dict[str, str]:
    """Return the variables by which programs reach the network from this machine, and the forwarded ones."""
    names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", *FORWARDED)
    return {
        name: value for name, value in os.environ.items()
        if name in names or name.lower().endswith("_proxy")
    }  # fmt: skip
