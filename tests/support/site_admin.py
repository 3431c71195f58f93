"""The site admin's tutorial in a lab, followed as root, and the replacements for names in its examples."""

import pwd
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .run_documentation import Step, Walk

PAGE = "tutorials/site-admin.md"
BRIDGE, JOBS = "isthmus", "isthmus-jobs"
_SUDOERS = "/etc/sudoers.d/isthmus-bridge"


@dataclass
class Installation:
    """Site as the tutorial leaves it. Paths of the examples are below ``root``."""

    root: Path
    walk: Walk
    host: str
    port: int
    metrics_port: int
    sudoers: Path

    @property
    def configuration(self) -> Path:
        """Directory that replaces /etc/isthmus-bridge."""
        return self.root / "etc/isthmus-bridge"

    @property
    def operator(self) -> Path:
        """Directory for the cluster's admin, named after the cluster."""
        (found,) = (self.root / "admin/isthmus-ca").glob("operator-*")
        return found

    def follow(self) -> None:
        """Follow the tutorial up to the running bridge."""
        self.walk.follow(PAGE, lambda step: not _looks(step))

    def look(self) -> str:
        """Follow the tutorial's last part, and return the output of the last command."""
        self.walk.follow(PAGE, _looks)
        return self.walk.said[-1]


def _looks(step: Step) -> bool:
    return step.command.startswith(("squeue", "curl"))


@contextmanager
def installed(
    root: Path,
    python: Path,
    conf: Path,
    host: str,
    ports: tuple[int, int],
    instead: Mapping[str, str],
    wrapped: Callable[[list[str]], list[str]] = lambda argv: argv,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Installation]:
    """Yield the place where the tutorial can be followed: create the users, and remove everything at the end.

    ``instead`` holds further replacements for names in the page. ``root`` belongs to root, and every user may pass
    through it.
    """
    sudoers = Path(f"/etc/sudoers.d/isthmus-test-{secrets.token_hex(4)}")
    port, metrics_port = ports
    names = {
        # The package's own command is not installed here.
        **{f"isthmus-bridge {verb}": f"{python} -m isthmus_bridge.cli {verb}"
           for verb in ("certs", "check", "doctor", "serve", "sudoers")},
        _SUDOERS: str(sudoers),
        "login1.example": host,
        "0.0.0.0:7444": f"{host}:{port}",
        "127.0.0.1:9090": f"127.0.0.1:{metrics_port}",
        "/etc/isthmus-bridge": f"{root}/etc/isthmus-bridge",
        "/var/lib/isthmus-bridge": f"{root}/var/lib/isthmus-bridge",
        "/scratch/": f"{root}/scratch/",
        "/etc/slurm/slurm.conf": str(conf),
    }  # fmt: skip
    # The caller's replacements come first, because their keys may contain a shorter name of the page.
    names = {**instead, **names}
    admin = root / "admin"
    admin.mkdir(mode=0o700)
    with _users():
        walk = Walk(admin, environment or _ENVIRONMENT, names, wrapped)
        try:
            yield Installation(root, walk, host, port, metrics_port, sudoers)
        finally:
            walk.close()
            sudoers.unlink(missing_ok=True)


_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
}


@contextmanager
def _users() -> Iterator[None]:
    """Create the missing users with the tutorial's own commands, and remove them at the end."""
    text = (Path(__file__).resolve().parents[2] / "docs" / PAGE).read_text()
    made = []
    try:
        for line in re.findall(r"^useradd .*$", text, re.MULTILINE):
            user = line.split()[-1]
            try:
                pwd.getpwnam(user)
            except KeyError:
                subprocess.run(line.split(), check=True)
                made.append(user)
        assert {BRIDGE, JOBS} <= {line.pw_name for line in pwd.getpwall()}
        yield
    finally:
        for user in made:
            subprocess.run(["userdel", "--remove", user], capture_output=True, check=False)


def remove(root: Path) -> None:
    """Remove the folder, including files of other users."""
    shutil.rmtree(root, ignore_errors=True)
