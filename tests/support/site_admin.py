"""The site admin's tutorial in a lab: root follows it, and what stands for its examples' names there."""

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
    """The site as the tutorial leaves it. Paths of the examples lie below ``root``."""

    root: Path
    walk: Walk
    host: str
    port: int
    metrics_port: int
    sudoers: Path

    @property
    def configuration(self) -> Path:
        """The folder that stands for /etc/isthmus-bridge."""
        return self.root / "etc/isthmus-bridge"

    @property
    def operator(self) -> Path:
        """The folder that the cluster's admin gets; its name is that of the cluster."""
        (found,) = (self.root / "admin/isthmus-ca").glob("operator-*")
        return found

    def follow(self) -> None:
        """Everything up to the bridge that serves."""
        self.walk.follow(PAGE, lambda step: not _looks(step))

    def look(self) -> str:
        """The tutorial's last part; what the last command printed."""
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
    """Create the users, and remove everything in the end. ``instead``: further replacements for names of the page.

    ``root`` belongs to root, and every user may pass through it.
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
    # What a caller says comes first: it may hold a shorter name of the page.
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
    """The tutorial's own lines that make users, where these are missing."""
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
