"""Inputs of an image and their digest, which shows if the image is up to date."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.image_builder.common import ROOT, BuildError

IGNORED_DIRECTORIES = {"__pycache__", "build", "dist"}


@dataclass(frozen=True)
class Image:
    """One of the project's images."""

    name: str
    projects: tuple[str, ...]

    @property
    def dockerfile(self) -> Path:
        return ROOT / "images" / self.name / "Dockerfile"

    def package_files(self) -> list[Path]:
        """Yield the files that the stage `packages` of the Dockerfile reads."""
        projects = [ROOT / project / "pyproject.toml" for project in self.projects]
        return sorted([self.dockerfile, ROOT / "constraints.txt", *_files(ROOT / "images" / "base"), *projects])

    def files(self) -> list[Path]:
        """Yield every file that the Dockerfile reads; .dockerignore excludes all others."""
        code = [path for project in self.projects for path in _files(ROOT / project)]
        return sorted({*self.package_files(), ROOT / ".dockerignore", *code})


def digest(files: Iterable[Path], arguments: Mapping[str, str]) -> str:
    """Return the digest of paths, contents, modes and build arguments. Equal digests give equal images."""
    state = hashlib.sha256()
    for name, value in sorted(arguments.items()):
        state.update(f"{name}={value}\0".encode())
    for path in files:
        content = path.read_bytes()
        executable = bool(path.stat().st_mode & 0o100)
        state.update(f"{path.relative_to(ROOT)}\0{executable}\0{len(content)}\0".encode())
        state.update(content)
    return state.hexdigest()


IMAGES = {
    image.name: image
    for image in (
        Image("operator", ("contracts", "operator")),
        Image("bridge", ("contracts", "bridge")),
        Image("runtime", ("contracts", "runtime", "examples")),
    )
}


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith(".") or path.suffix in {".pyc", ".egg-info"}:
            continue
        if path.is_dir():
            if path.name not in IGNORED_DIRECTORIES:
                yield from _files(path)
        elif path.is_file():
            yield path


def version() -> str:
    """Return the project's version, which all packages share."""
    found = {
        folder: tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]["version"]
        for folder in ("contracts", "runtime", "bridge", "operator", "examples")
    }
    if len(set(found.values())) != 1:
        raise BuildError(f"the packages' versions differ: {found}")
    return str(found["contracts"])
