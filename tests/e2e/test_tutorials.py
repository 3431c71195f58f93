"""The three tutorials, followed one after the other: a site is set up, a platform connects it, and a user trains."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.run_documentation import ROOT, Step, Walk
from tests.support.site_admin import installed, remove

from .conftest import CLUSTER, REPOSITORY, Platform, eventually, run, say

BRIDGE_PORT = 7455
METRICS_PORT = 9475


@dataclass
class Place:
    """Local values for the names in the examples."""

    platform: Platform
    site: Path
    rootfs: Path
    installation: ExitStack = field(default_factory=ExitStack)
    """Closed last, because only a running bridge can cancel a deleted job's tasks."""

    @property
    def names(self) -> dict[str, str]:
        """Texts of the pages and their replacements; longer texts first."""
        lab = self.platform.slurm.lab
        container = (
            f"prefix: [ch-run, --set-env, '--bind={{tls_dir}}:/mnt', {self.rootfs}, --]\n    inside: {{tls_dir: /mnt}}"
        )
        return {
            "login1.example:7444": f"{lab.node_address}:{BRIDGE_PORT}",
            "venv: /appl/isthmus/venv": container,
            "operator-prod": f"operator-{CLUSTER}",
            "operator.cluster=prod": f"operator.cluster={CLUSTER}",
            "--operator prod": f"--operator {CLUSTER}",
            "isthmus://operator/prod": f"isthmus://operator/{CLUSTER}",
            "registry.example": REPOSITORY,
            # On a busy machine, a user would run the command again.
            "--timeout=60s": "--timeout=240s",
            "--timeout=300s": "--timeout=580s",
            # The lab has no registry, and a short resync interval keeps the tests fast.
            "=true --wait": "=true --set image.pullPolicy=Never --set operator.resyncSeconds=1 --wait",
        }


@pytest.fixture
def place(cluster: Platform, tmp_path: Path) -> Iterator[Place]:
    if cluster.site is None:
        pytest.skip("the tutorials need a Slurm site: only the lab has one")
    site = cluster.site
    # It must belong to root, like all parent directories of the bridge's files.
    directory = Path(site.lab.home).parent / "tutorial"
    directory.mkdir(mode=0o755)
    here = Place(cluster, directory, site.rootfs)
    try:
        yield here
    finally:
        run("kubectl", "delete", "fj", "both-worlds", "my-digits", "--ignore-not-found", "--timeout=120s", check=False)
        run("kubectl", "delete", "hpcsite", "lumi", "--ignore-not-found", "--timeout=120s", check=False)
        run("kubectl", "delete", "configmap", "my-code", "--ignore-not-found", check=False)
        run("kubectl", "-n", "isthmus-system", "delete", "secret", "site-lumi", "--ignore-not-found", check=False)
        here.installation.close()
        remove(directory)


@pytest.mark.timeout(1800)  # three tutorials, with two complete trainings
def test_the_tutorials(place: Place, tmp_path: Path) -> None:
    lab = place.platform.slurm.lab
    site = place.installation.enter_context(
        installed(
            place.site, lab.user_python(), lab.slurm_conf, lab.node_address, (BRIDGE_PORT, METRICS_PORT), place.names,
            wrapped=lab.command, environment=lab.env(),
        )
    )  # fmt: skip
    admin = site.walk
    site.follow()
    eventually("the bridge serves", lambda: _serves(f"http://127.0.0.1:{METRICS_PORT}/metrics"))
    assert 'isthmus_bridge_slurm_up{site="lumi"}' in site.look()

    (tmp_path / "charts").symlink_to(ROOT / "charts")
    shutil.copytree(site.operator, tmp_path / f"operator-{CLUSTER}")
    engineer = Walk(tmp_path, dict(os.environ), place.names)
    engineer.follow("tutorials/platform-engineer.md")
    assert any("both-worlds" in said and "Complete" in said for said in engineer.said)

    scientist = Walk(tmp_path, dict(os.environ), place.names)
    scientist.follow("tutorials/data-scientist.md", _in_the_cluster)
    assert any("kubectl get fj my-digits" in said and "Complete" in said for said in scientist.said)
    for walk in (admin, engineer, scientist):
        say("\n".join(walk.said))


def _in_the_cluster(step: Step) -> bool:
    return not step.command or step.command.startswith("kubectl")


def _serves(address: str) -> bool:
    return (
        subprocess.run(["curl", "-sf", "--max-time", "10", address], capture_output=True, check=False).returncode == 0
    )
