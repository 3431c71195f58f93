"""The image builder without an engine: its inputs, and the settings that it takes from the machine."""

import re
from pathlib import Path

import pytest

from tools.image_builder import host, inputs

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", inputs.IMAGES)
def test_the_hash_covers_what_the_dockerfile_copies(name: str) -> None:
    image = inputs.IMAGES[name]
    files = {str(path.relative_to(ROOT)) for path in image.files()}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", image.dockerfile.read_text(), re.MULTILINE)
    assert copied
    for source in " ".join(copied).split():
        assert source in files or any(file.startswith(f"{source}/") for file in files), source


@pytest.mark.parametrize("name", inputs.IMAGES)
def test_files_outside_of_the_inputs_are_not_in_the_build_context(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    admitted = {line[1:] for line in ignored if line.startswith("!")}
    needed = {str(path.relative_to(ROOT)) for path in inputs.IMAGES[name].files()}
    outside = {".dockerignore", f"images/{name}/Dockerfile"}
    assert all(any(file == root or file.startswith(f"{root}/") for root in admitted) for file in needed - outside)


def test_the_hash_follows_content_mode_and_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".dockerignore", "constraints.txt", "images/operator/Dockerfile", "images/base/a.sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for folder in ("contracts", "operator/__pycache__", "operator/x.egg-info"):
        (tmp_path / folder).mkdir(parents=True)
    for project in ("contracts", "operator"):
        (tmp_path / project / "pyproject.toml").touch()
    code = tmp_path / "operator" / "code.py"
    code.write_text("1")
    monkeypatch.setattr(inputs, "ROOT", tmp_path)

    def digest(**arguments: str) -> str:
        return inputs.digest(inputs.IMAGES["operator"].files(), arguments)

    seen = [digest()]
    (tmp_path / "operator/__pycache__/code.pyc").write_text("x")
    (tmp_path / "operator/x.egg-info/SOURCES.txt").write_text("x")
    code.touch()
    assert digest() == seen[0]
    seen.append(digest(BASE_IMAGE="other"))
    code.write_text("2")
    seen.append(digest())
    code.chmod(0o755)
    seen.append(digest())
    code.rename(code.with_name("renamed.py"))
    seen.append(digest())
    assert len(set(seen)) == len(seen)


def test_pips_configuration_is_passed_on_without_the_machines_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels, bundle = tmp_path / "wheels", tmp_path / "ca.pem"
    wheels.mkdir()
    bundle.write_text("certificate")
    configuration = (
        f"global.index-url='https://user:secret@index.example/simple'\n"
        f"global.extra-index-url='file://{tmp_path}/simple https://more.example/simple'\n"
        f"global.constraint='{tmp_path}/constraints.txt'\n"
        f":env:.find-links='{wheels}'\n"
        f":env:.default-timeout='99'\n"
        f":env:.cert='{bundle}'"
    )
    monkeypatch.setattr(host, "output_of", lambda command: configuration)
    borrowed = host.borrow(tmp_path)
    assert borrowed.wheels == wheels and borrowed.ca_bundle == bundle and borrowed.pip_conf is not None
    assert borrowed.pip_conf.read_text().splitlines() == [
        "[global]",
        "index-url = https://user:secret@index.example/simple",
        "extra-index-url = https://more.example/simple",
        "timeout = 99",
    ]
    assert borrowed.pip_conf.stat().st_mode & 0o077 == 0


def test_without_configuration_nothing_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in host.CA_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(host, "output_of", lambda command: "")
    assert host.borrow(tmp_path) == host.Borrowed()


def test_the_versions_of_the_packages_agree() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", inputs.version())
