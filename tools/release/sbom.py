"""CycloneDX documents of the distributions that a package installs, in the versions of constraints.txt."""

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot5
from packageurl import PackageURL
from packaging.requirements import Requirement

from .version import ROOT, ReleaseError, current

# Packages that each image installs; their dependencies come in addition.
IMAGES = {
    "operator": ("isthmus-operator",),
    "bridge": ("isthmus-bridge",),
    "runtime": ("isthmus", "isthmus-examples"),
}


def write(image: str, file: Path) -> int:
    """Write the document of an image's Python and return its number of distributions. Raises :class:`ReleaseError`."""
    pins = _pins()
    bom = Bom()
    bom.metadata.component = Component(name=f"isthmus-{image}", version=current(), type=ComponentType.CONTAINER)
    needs = _closure(IMAGES[image])
    components = {name: _component(name, pins) for name in sorted(needs)}
    for name, component in components.items():
        bom.components.add(component)
        bom.register_dependency(component, [components[other] for other in sorted(needs[name])])
    bom.register_dependency(bom.metadata.component, [components[_normal(name)] for name in IMAGES[image]])
    file.write_text(JsonV1Dot5(bom).output_as_string(indent=1) + "\n")
    return len(components)


def _closure(roots: tuple[str, ...]) -> dict[str, set[str]]:
    """Return each distribution that the roots need, with its own dependencies. The images install no extras."""
    found: dict[str, set[str]] = {}
    waiting = [_normal(root) for root in roots]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            lines = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            raise ReleaseError(f"{name} is not installed here: run `make setup`") from None
        wanted = [Requirement(line) for line in lines]
        found[name] = {_normal(one.name) for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})}
        waiting += found[name]
    return found


def _component(name: str, pins: Mapping[str, str]) -> Component:
    about = metadata.distribution(name).metadata
    version = current() if name.startswith("isthmus") else pins.get(name, about["Version"])
    # Use only SPDX expressions: some distributions have the whole text of the licence there.
    licence = next((about[key] for key in ("License-Expression", "License") if key in about), "")
    licences = [LicenseFactory().make_from_string(licence)] if re.fullmatch(r"[\w .()+-]{1,80}", licence) else []
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        purl=PackageURL("pypi", name=name, version=version),
        bom_ref=name,
        licenses=licences,
    )


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {_normal(name): version for name, version in pairs}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
