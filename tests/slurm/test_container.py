"""A command prefix from the policy: the script runs in a charliecloud container inside a Slurm job."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus_bridge.files.run_directory import AUDIT_FOLDER
from isthmus_contracts.pb import bridge_pb2 as pb

from .slurm_site import Site, ensure, over, spec, tail

SCRIPT = (
    'echo "at $(pwd)"; echo "$ISTHMUS_TLS_DIR: $(ls "$ISTHMUS_TLS_DIR")"; echo "$GREETING"; : >left; ls -a / | head -50'
)


@pytest.fixture
def image(site: Site, require: Callable[[bool, str], None]) -> Path:
    """Return a directory with a shell and little else."""
    require(shutil.which("ch-run") is not None, "install Debian's package charliecloud")
    root = site.folder / "image"
    for name in ("dev", "proc", "sys", "tmp", "home", "root", "mnt/0", "mnt/1", "etc", "bin", "usr/bin"):
        (root / name).mkdir(parents=True)
    for name in ("passwd", "group", "hosts", "resolv.conf"):
        (root / "etc" / name).touch()
    for program in ("/bin/sh", "/bin/ls", "/usr/bin/head"):
        linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        for path in [program, *re.findall(r"(/\S+) \(0x", linked)]:
            target = root / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(path).resolve(), target)
    return root


def test_the_script_runs_in_the_container(site: Site, image: Path) -> None:
    site.settings["environments"]["container"] = {
        "prefix": ["ch-run", "--bind={tls_dir}:/mnt/0", "--bind={work_dir}:/mnt/1", "--cd=/mnt/1",
                   "--bind={data}:/mnt/2", str(image), "--"],
        "inside": {"tls_dir": "/mnt/0", "work_dir": "/mnt/1"},
    }  # fmt: skip
    operator = site.start()
    key = site.key()
    wanted = spec(environment="container", command=["/bin/sh", "-c", SCRIPT], env={"GREETING": "$(id) 'x'"})
    ensure(operator, key, wanted)
    pool = over(operator, key)
    text = tail(operator, key, 1)
    assert pb.Pool.Phase.Name(pool.phase) == "SUCCEEDED", (pool, text)
    lines = text.splitlines()
    assert lines[0] == "at /mnt/1"
    assert lines[1:4] == ["/mnt/0: ca.crt", "tls.crt", "tls.key"]
    assert lines[4] == "$(id) 'x'"
    assert "work" not in lines and "var" not in lines, "this is not the image's root"
    assert {path.name for path in (site.folder / "run" / key / "work" / "1").iterdir()} == {AUDIT_FOLDER, "left"}
