"""Tests with a real Slurm: run them in the lab, `python -m lab exec -- python -m pytest tests/slurm`, or at a cluster.

In a lab the bridge runs as its unprivileged user, who owns the jobs; elsewhere as the user who runs the tests.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from isthmus_contracts.pb import bridge_pb2_grpc as rpc

from .slurm_site import Site, slurm, until

if TYPE_CHECKING:
    from lab import Lab

HINT = "no Slurm: run `python -m lab exec -- python -m pytest tests/slurm`, or set SLURM_CONF to a cluster's slurm.conf"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Set the tests' time limits, and deselect pyslurm's tests where pyslurm is missing.

    Each wait has its own deadline, and their sum is larger than for other tests. The lab's own Slurm is too old for
    pyslurm: tests/run.sh runs these tests once more, with `python -m lab newer-slurm`.
    """
    if "ISTHMUS_LAB" in os.environ and "ISTHMUS_PYSLURM" not in os.environ:
        elsewhere = [item for item in items if _way(item) == "pyslurm"]
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))


def _way(item: pytest.Item) -> str | None:
    """Return the adapter of a test that is parametrized by adapter."""
    spec = getattr(item, "callspec", None)
    return spec.params.get("make") if spec is not None else None


@pytest.fixture(scope="session")
def _cluster(require: Callable[[bool, str], None]) -> None:
    answers = False
    if "SLURM_CONF" in os.environ:
        asked = subprocess.run(["sinfo", "-h"], capture_output=True, timeout=120, check=False)
        answers = asked.returncode == 0
    require(answers, HINT)


@pytest.fixture
def site(_cluster: None) -> Iterator[Site]:
    user, python, parent, environ = None, Path(sys.executable), Path(tempfile.gettempdir()), {}
    if "ISTHMUS_LAB" in os.environ and os.getuid() == 0:
        from lab import Lab

        lab = Lab()
        user, python, parent, environ = lab.user, lab.user_python(), lab.home, lab.env(lab.user)
    one = Site(Path(tempfile.mkdtemp(prefix="bridge-test-", dir=parent)), user, python, environ)
    yield one
    one.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a directory that the nodes can write to."""
    parent = tempfile.gettempdir()
    with suppress(KeyError):
        parent = f"{os.environ['ISTHMUS_LAB']}/home"
    with tempfile.TemporaryDirectory(prefix="bridge-test-", dir=parent) as name:
        yield Path(name)


@pytest.fixture
def operator(site: Site) -> rpc.BridgeStub:
    """Start the bridge, and return the operator's stub for it."""
    return site.start()


@pytest.fixture
def lab(_cluster: None, require: Callable[[bool, str], None]) -> "Lab":
    """Return the lab that the tests run in. Tests can stop and start its daemons and take down its nodes."""
    require("ISTHMUS_LAB" in os.environ and os.getuid() == 0, f"faults of Slurm itself need the lab, as root: {HINT}")
    from lab import Lab

    return Lab()


@pytest.fixture
def amnesia(lab: "Lab") -> Iterator[Callable[[], None]]:
    """Yield a function that makes the controller forget every job, as at a site without accounting.

    Accounting is restored at the end.
    """
    conf = lab.slurm_conf
    kept = conf.read_text()

    def forget() -> None:
        lab.stop_slurm_daemon("slurmctld")
        conf.write_text(re.sub(r"(?m)^JobComp.*\n", "", kept))
        for path in (conf.parent / "state").glob("job_state*"):
            path.unlink()
        lab.start_slurm_daemon("slurmctld")

    yield forget
    conf.write_text(kept)
    lab.stop_slurm_daemon("slurmctld")
    lab.start_slurm_daemon("slurmctld")
    until(lambda: set(slurm("sinfo", "-h", "-N", "-o", "%T").split()) <= {"idle", "mixed"}, "the nodes are back")
