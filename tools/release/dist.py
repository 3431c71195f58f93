"""Contents of a release, built into one directory; docs/development/releases.md describes them."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

from . import sbom
from .version import PACKAGES, ROOT, ReleaseError, current

# Packages with a command of the same name, whose --version must match.
COMMANDS = ("isthmus-bridge", "isthmus-operator", "isthmus")


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"release: {text}", file=sys.stderr, flush=True)


def run(command: Sequence[str | Path], what: str) -> str:
    """Run the command and return its output. Raises :class:`ReleaseError` with the end of the output."""
    # With this, the same commit gives the same wheels and the same chart.
    environment = {"SOURCE_DATE_EPOCH": _commit_time(), **os.environ}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()[-5:]
        raise ReleaseError(f"{what} failed: {' / '.join(words)}")
    return done.stdout


def wheels(target: Path) -> None:
    """Build the wheel of each package."""
    for package in PACKAGES:
        with tempfile.TemporaryDirectory() as scratch:
            # Build from a copy: setuptools would include files that an earlier build left in build/.
            copy = Path(scratch) / package
            shutil.copytree(ROOT / package, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
            run(
                [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, copy],
                f"the wheel of {package}",
            )


def chart(target: Path) -> None:
    """Package the chart."""
    run([_helm(), "package", ROOT / "charts" / "isthmus", "--destination", target], "helm package")


def publish(output: Path, registry: str, plain_http: bool = False) -> str:
    """Push the packaged chart to an OCI registry and return its reference. Raises :class:`ReleaseError`."""
    if not registry.startswith("oci://"):
        raise ReleaseError(f"{registry!r} is no OCI registry; give one such as oci://registry.example/charts")
    package = output / "charts" / f"isthmus-{current()}.tgz"
    if not package.is_file():
        raise ReleaseError(f"{package} is missing: run `make dist DIST=chart`")
    run([_helm(), "push", package, registry, *(["--plain-http"] if plain_http else [])], "helm push")
    return f"{registry.rstrip('/')}/isthmus:{current()}"


def images(target: Path) -> None:
    """Build the archives of the images."""
    run([ROOT / "images" / "build", "--output", target], "images/build")
    for leftover in target.glob("*.inputs"):
        leftover.unlink()


def sboms(target: Path) -> None:
    """Write one SBOM per image."""
    for image in sbom.IMAGES:
        count = sbom.write(image, target / f"isthmus-{image}.cdx.json")
        say(f"the SBOM of {image} names {count} distributions")


PARTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "wheels": ("wheels", wheels),
    "chart": ("charts", chart),
    "sbom": ("sbom", sboms),
    "images": ("images", images),
}


def make(parts: Sequence[str], output: Path) -> None:
    """Build the parts, their checksums and the bundle. Raises :class:`ReleaseError`."""
    output = output.absolute()
    for part in parts:
        folder, maker = PARTS[part]
        target = output / folder
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        say(f"making {part}")
        maker(target)
    for name in ("CHANGELOG.md", "LICENSE", "constraints.txt"):
        shutil.copy2(ROOT / name, output / name)
    shutil.copy2(ROOT / "docs" / "development" / "releases.md", output / "INSTALL.md")
    bundle = output / f"isthmus-{current()}-airgap.tar"
    bundle.unlink(missing_ok=True)
    files = sorted(path for path in output.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    (output / "SHA256SUMS").write_text("".join(f"{_digest(path)}  {path.relative_to(output)}\n" for path in files))
    with tarfile.open(bundle, "w") as archive:
        for path in [*files, output / "SHA256SUMS"]:
            archive.add(path, f"isthmus-{current()}/{path.relative_to(output)}")
    say(f"{bundle} holds {len(files)} files, {bundle.stat().st_size / 1e6:.1f} MB")


def check(output: Path) -> None:
    """Install the wheel of each command into a clean virtual environment and compare its version.

    Needs a package index for their dependencies. Raises :class:`ReleaseError`.
    """
    for package in COMMANDS:
        with tempfile.TemporaryDirectory() as scratch:
            venv.create(scratch, with_pip=True)
            python = Path(scratch) / "bin" / "python"
            # Install from the file: an index may have other packages of these names.
            ours = [_wheel(output, name) for name in ("isthmus-contracts", package)]
            pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            run([*pip, "--constraint", output / "constraints.txt", *ours], f"pip install {package}")
            told = run([python.with_name(package), "--version"], f"{package} --version").strip().split()[-1]
            if told != current():
                raise ReleaseError(f"{package} --version says {told}, and VERSION {current()}")
            say(f"{package} {told}, in a clean virtual environment")


def _wheel(output: Path, package: str) -> Path:
    name = f"{package.replace('-', '_')}-{current()}-py3-none-any.whl"
    path = output / "wheels" / name
    if not path.is_file():
        raise ReleaseError(f"{path} is missing: run `make dist`")
    return path


def _helm() -> Path:
    found = shutil.which("helm")
    if found:
        return Path(found)
    from lab.software import client_tools

    return client_tools.find()["helm"]


def _commit_time() -> str:
    """Return the last commit's time in Unix seconds, or a fixed time without git or its history."""
    command = ["git", "log", "-1", "--format=%ct"]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        said = ""
    return said or "1704067200"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
