"""One version everywhere, and a release with the content that docs/development/releases.md promises, except images."""

import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools.release import dist, sbom, version

ROOT = Path(__file__).parents[3]


def test_every_place_states_the_version() -> None:
    told = list(version.stated())
    assert {found for _, found in told} == {version.current()}
    assert {name for name, _ in told} >= {f"{package}/pyproject.toml" for package in version.PACKAGES}
    assert f"## {version.current()}" in (ROOT / "CHANGELOG.md").read_text()


def test_a_new_version_reaches_every_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in {"VERSION", *(name for name, _ in version.stated())}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(version, "ROOT", tmp_path)
    monkeypatch.setattr(version, "SOURCE", tmp_path / "VERSION")
    changed = version.write("7.1.0rc2")
    assert "VERSION" in changed and "charts/isthmus/Chart.yaml" in changed
    assert {found for _, found in version.stated()} == {version.current()} == {"7.1.0rc2"}
    assert not version.write("7.1.0rc2")


@pytest.mark.parametrize("wrong", ["", "1.2", "v1.2.3", "1.2.3 ", "1.2.3-beta"])
def test_malformed_versions_are_refused(wrong: str) -> None:
    with pytest.raises(version.ReleaseError, match="no version"):
        version.write(wrong)


def test_a_release_needs_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert int(dist._commit_time()) >= 1704067200
    monkeypatch.setenv("PATH", str(tmp_path))
    assert dist._commit_time() == "1704067200"


def test_wheels_hold_the_code_and_what_goes_with_it(tmp_path: Path) -> None:
    dist.wheels(tmp_path)
    names = {wheel.name: set(zipfile.ZipFile(wheel).namelist()) for wheel in tmp_path.iterdir()}
    assert len(names) == len(version.PACKAGES)
    assert all(f"-{version.current()}-py3-none-any.whl" in name for name in names)
    content = set().union(*names.values())
    for package in version.PACKAGES:
        code = {
            str(path.relative_to(ROOT / package))
            for path in (ROOT / package).rglob("*")
            if path.suffix in (".py", ".j2", ".pyi", ".proto", ".typed") and "build" not in path.parts
        }
        assert code <= content, package


def test_the_bills_of_material_name_what_images_install(tmp_path: Path) -> None:
    for image in sbom.IMAGES:
        sbom.write(image, tmp_path / image)
        document = json.loads((tmp_path / image).read_text())
        assert document["bomFormat"] == "CycloneDX"
        found = {component["name"]: component["version"] for component in document["components"]}
        assert found["isthmus-contracts"] == version.current() and "grpcio" in found
        assert ("torch" in found) == (image == "runtime") and ("kopf" in found) == (image == "operator")
        pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
        assert found["grpcio"] == pinned["grpcio"]


def test_the_bundle_has_everything_with_its_checksum(tmp_path: Path) -> None:
    dist.make(["sbom"], tmp_path)
    name = f"isthmus-{version.current()}"
    with tarfile.open(tmp_path / f"{name}-airgap.tar") as bundle:
        held = {member.name.removeprefix(f"{name}/") for member in bundle.getmembers()}
    listed = {line.split("  ")[1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()}
    assert held == listed | {"SHA256SUMS"}
    assert listed >= {"INSTALL.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "sbom/isthmus-bridge.cdx.json"}
