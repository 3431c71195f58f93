"""`isthmus-bridge certs`: the files that it keeps, and the requests that it refuses."""

from pathlib import Path

import pytest

from isthmus_bridge.cli import main
from isthmus_contracts.wire.pki import Credentials, certificates_in


def certs(folder: Path, *options: str) -> int:
    return main(["certs", "--dir", str(folder), *options])


def test_an_authority_whose_key_is_kept_elsewhere_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, away = tmp_path / "certs", tmp_path / "away"
    assert certs(folder, "--host", "login1.example", "--operator", "prod") == 0
    (folder / "ca.key").rename(away)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    for options in (["--operator", "second"], ["--host", "login1.example"], ["--only-this-ca"]):
        assert certs(folder, *options) == 1
        assert capsys.readouterr().err == (
            f"isthmus-bridge: {folder}: ca.key is missing: put it there temporarily, or create a new CA with --new-ca\n"
        )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    away.rename(folder / "ca.key")
    assert certs(folder, "--operator", "second") == 0
    assert Credentials.read(folder / "operator-second").ca == before[folder / "ca.crt"]


def test_a_new_authority_needs_no_key_of_the_old_one_which_stays_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    assert certs(folder, "--host", "login1.example") == 0
    old = (folder / "ca.crt").read_bytes()
    (folder / "ca.key").unlink()
    assert certs(folder, "--new-ca", "--operator", "prod") == 0
    new, kept = certificates_in((folder / "ca.crt").read_bytes())
    assert (kept, new != old) == (certificates_in(old)[0], True)


def test_a_key_without_its_certificate_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "certs"
    assert certs(folder, "--operator", "prod") == 0
    key = (folder / "ca.key").read_bytes()
    (folder / "ca.crt").unlink()
    assert certs(folder, "--operator", "prod") == 1
    assert "ca.crt is missing" in capsys.readouterr().err
    assert (folder / "ca.key").read_bytes() == key
