"""Version of the project: kept in VERSION and repeated in the files that need it."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "VERSION"
FORM = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")
PACKAGES = ("contracts", "runtime", "bridge", "operator", "examples")

_V = r"(\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?)"
_IMAGE = re.compile(rf"isthmus-(?:runtime|operator|bridge):{_V}")
_PLACES: dict[str, tuple[re.Pattern[str], ...]] = {
    **{f"{package}/pyproject.toml": (re.compile(rf'^version = "{_V}"$', re.MULTILINE),) for package in PACKAGES},
    "charts/isthmus/Chart.yaml": (re.compile(rf"^(?:version|appVersion): {_V}$", re.MULTILINE), _IMAGE),
    "README.md": (_IMAGE,),
    "bridge/systemd/isthmus-bridge.container": (_IMAGE,),
    "examples/digits.yaml": (_IMAGE,),
    "examples/fashion-mnist.yaml": (_IMAGE,),
    "examples/secure.yaml": (_IMAGE,),
    "docs/tutorials/data-scientist.md": (_IMAGE,),
    "docs/tutorials/platform-engineer.md": (_IMAGE,),
    "docs/development/releases.md": (re.compile(rf"isthmus-{_V}"), re.compile(rf"--version {_V}")),
}


class ReleaseError(Exception):
    """Failure of a release, printed as one message without a traceback."""


def current() -> str:
    """Return the version in VERSION. Raises :class:`ReleaseError`."""
    text = SOURCE.read_text().strip()
    if not FORM.fullmatch(text):
        raise ReleaseError(f"VERSION: {text!r} is no version; write one such as 0.2.0 or 0.2.0rc1")
    return text


def stated() -> Iterator[tuple[str, str]]:
    """Yield each file that repeats the version, with that version. Raises :class:`ReleaseError` if one has none."""
    for name, patterns in _PLACES.items():
        text = (ROOT / name).read_text()
        for pattern in patterns:
            found = pattern.findall(text)
            if not found:
                raise ReleaseError(
                    f"{name} no longer contains the version: fix that file, or its pattern in tools/release/version.py"
                )
            yield from ((name, version) for version in found)


def write(version: str) -> list[str]:
    """Write a version to every file and return the changed files. Raises :class:`ReleaseError`."""
    if not FORM.fullmatch(version):
        raise ReleaseError(f"{version!r} is no version; give one such as 0.2.0 or 0.2.0rc1")
    list(stated())
    changed = []
    for name, patterns in _PLACES.items():
        path = ROOT / name
        before = text = path.read_text()
        for pattern in patterns:
            text = pattern.sub(lambda match: match[0].replace(match[1], version), text)
        if text != before:
            path.write_text(text)
            changed.append(name)
    if SOURCE.read_text().strip() != version:
        SOURCE.write_text(version + "\n")
        changed.append(SOURCE.name)
    return changed
