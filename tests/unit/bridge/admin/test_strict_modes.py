"""Users who could change or read the bridge's files: `check` reports them, and `serve` refuses if they can use it."""

import os
import pwd
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from isthmus_bridge.admin import strict_modes
from isthmus_bridge.cli import main
from isthmus_bridge.policy.policy import Policy, PolicyError, load
from isthmus_bridge.users.doctor import code_paths
from isthmus_contracts.identities import operator_identity

Lines = Callable[[], dict[str, bool]]


class Site:
    """Policy and the files that it names, in a directory that every user may pass."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "etc" / "policy.yaml"
        self.tls, self.run, self.bin = folder / "etc" / "tls", folder / "scratch" / "run", folder / "bin"
        for path in (self.tls, self.run, self.bin):
            path.mkdir(parents=True, mode=0o755)
        self.run.chmod(0o700)
        for name, mode in (("tls.key", 0o600), ("tls.crt", 0o644), ("ca.crt", 0o644)):
            (self.tls / name).touch(mode=mode)
        self.settings: dict[str, object] = {
            "site": "test", "run_dir": str(self.run), "tls_dir": str(self.tls), "partitions": ["main"],
            "identities": [{"uri": operator_identity("prod")}], "environments": {"plain": {"prefix": ["env"]}},
            "slurm": {"bin_dir": str(self.bin)},
        }  # fmt: skip
        self.write()

    def write(self) -> None:
        self.file.write_text(yaml.safe_dump(self.settings))
        self.file.chmod(0o644)

    def policy(self) -> Policy:
        return load(self.file)

    def found(self) -> dict[str, bool]:
        """Return the findings below this directory, and whether each is fatal; the machine's Python is left out."""
        all_of_it = strict_modes.examine(self.policy(), self.file)
        return {one.line.replace(str(self.folder), ""): one.blocks_serving for one in all_of_it if one.path is not None
                and self.folder in one.path.parents}  # fmt: skip


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(strict_modes, "code_paths", lambda: [])
    old = os.umask(0o022)
    folder = Path(tempfile.mkdtemp(prefix="strict-", dir="/tmp"))
    folder.chmod(0o755)
    yield Site(folder)
    os.umask(old)
    shutil.rmtree(folder)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the user mallory into every group."""
    # The code under test calls cache_clear.
    everybody = lambda gid, trusted: ("mallory",)  # noqa: E731
    monkeypatch.setattr(everybody, "cache_clear", lambda: None, raising=False)
    monkeypatch.setattr(strict_modes, "_others", everybody)


@pytest.fixture
def belongs_to_another(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Return a function that gives a path to another user and returns the name.

    Without root, it makes the code believe that it runs as root instead.
    """

    def give(path: Path) -> str:
        if os.getuid() == 0:
            os.chown(path, pwd.getpwnam("daemon").pw_uid, -1)
            return "daemon"
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        return pwd.getpwuid(os.getuid()).pw_name

    return give


def test_an_ordinary_site_is_in_order(site: Site) -> None:
    assert site.found() == {}
    assert strict_modes.require(site.policy(), site.file)  # the remaining findings concern the jobs' user; see below


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("etc/policy.yaml", "policy: /etc/policy.yaml is writable by everybody; chmod o-w "),
        ("etc", "policy: /etc is writable by everybody; chmod o-w "),
        ("etc/tls", "tls_dir: /etc/tls is writable by everybody; chmod o-w "),
        ("scratch", "run_dir: /scratch is writable by everybody; chmod o-w "),
        ("scratch/run", "run_dir: /scratch/run is writable by everybody; chmod o-w "),
        ("bin", "slurm.bin_dir: /bin is writable by everybody; chmod o-w "),
    ],
)
def test_what_everybody_may_change_is_grave(site: Site, name: str, line: str) -> None:
    (site.folder / name).chmod(0o777)
    assert site.found() == {f"{line}/{name}": True}
    with pytest.raises(PolicyError, match=r"another user can act as the bridge: .* is writable by everybody"):
        strict_modes.require(site.policy(), site.file)


@pytest.mark.usefixtures("others")
def test_a_group_with_other_members_is_grave_above_the_run_directory(site: Site) -> None:
    (site.folder / "scratch").chmod(0o2775)
    group = strict_modes._group((site.folder / "scratch").stat().st_gid)
    assert site.found() == {f"run_dir: /scratch is writable by the group {group} (mallory); chmod g-w /scratch": True}


def test_a_private_group_is_safe(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is the case with a umask of 002 and a private group for each user."""
    alone = lambda gid, trusted: ()  # noqa: E731
    monkeypatch.setattr(alone, "cache_clear", lambda: None, raising=False)
    monkeypatch.setattr(strict_modes, "_others", alone)
    (site.folder / "scratch").chmod(0o775)
    (site.file).chmod(0o664)
    assert site.found() == {}
    # A group whose members are unknown gives a warning.
    monkeypatch.setattr(strict_modes, "_own_groups", lambda uid: frozenset())
    assert list(site.found().values()) == [False, False]


def test_files_in_a_sticky_folder_are_safe(site: Site) -> None:
    (site.folder / "scratch").chmod(0o1777)
    assert site.found() == {}
    site.run.chmod(0o1777)
    assert site.found() == {"run_dir: /scratch/run is writable by everybody; chmod o-w /scratch/run": True}


def test_behind_a_private_folder_it_is_a_warning(site: Site) -> None:
    site.file.chmod(0o666)
    site.file.parent.chmod(0o700)
    assert site.found() == {"policy: /etc/policy.yaml is writable by everybody; chmod o-w /etc/policy.yaml": False}


def test_links_are_followed(site: Site) -> None:
    other = site.folder / "other"
    other.mkdir()
    other.chmod(0o777)
    site.tls.rename(other / "tls")
    site.tls.symlink_to(other / "tls")
    assert site.found() == {"tls_dir: /other is writable by everybody; chmod o-w /other": True}


def test_a_key_that_everybody_reads_is_grave(site: Site) -> None:
    (site.tls / "tls.key").chmod(0o644)
    assert site.found() == {"tls_dir: /etc/tls/tls.key is readable by everybody; chmod o= /etc/tls/tls.key": True}
    # This is fine: root owns the key, and the bridge's group reads it.
    (site.tls / "tls.key").chmod(0o640)
    assert True not in site.found().values()


def test_the_owner_counts(site: Site, belongs_to_another: Callable[[Path], str], others: None) -> None:
    name = belongs_to_another(site.file)
    line = f"policy: /etc/policy.yaml belongs to {name}, who can change it; chown root /etc/policy.yaml"
    assert site.found()[line] is False, "an admin of the site, perhaps"


def test_a_run_directory_that_another_user_made_is_grave(site: Site, belongs_to_another: Callable[[Path], str]) -> None:
    (site.folder / "scratch").chmod(0o1777)
    name = belongs_to_another(site.run)
    line = f"run_dir: /scratch/run belongs to {name}, who can change it; remove it, or choose another run_dir"
    assert site.found()[line] is True


def test_what_belongs_to_the_user_of_jobs_is_grave(
    site: Site, belongs_to_another: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = belongs_to_another(site.file)
    site.settings["identities"] = [{"uri": operator_identity("prod"), "user": name}]
    site.settings["users"] = {"run_dir": f"{site.folder}/scratch/{{user}}/isthmus"}
    site.write()
    line = f"policy: /etc/policy.yaml belongs to {name}, whose jobs the bridge submits; chown root /etc/policy.yaml"
    assert site.found()[line] is True


def test_what_jobs_of_the_bridges_own_user_can_change_is_reported(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines() -> list[str]:
        found = strict_modes.examine(site.policy(), site.file)
        return [one.line for one in found if one.line.startswith("users: ")]

    me = os.getuid() or pwd.getpwnam("daemon").pw_uid
    if os.getuid() == 0:
        monkeypatch.setattr(os, "geteuid", lambda: me)
        for path in (site.file, site.tls):
            os.chown(path, me, -1)
    name = pwd.getpwuid(me).pw_name
    changes, reads = lines()
    assert changes.startswith(f"users: jobs run as {name}, the bridge's own user, and can change ")
    assert str(site.file.parent) in changes and changes.endswith("; let root own them: chown -R root PATH")
    assert reads == (
        f"users: jobs run as {name}, the bridge's own user, and can read {site.tls}/tls.key and write the journal;"
        " map each identity to a local user (identities[].user)"
    )
    assert not any(one.blocks_serving for one in strict_modes.examine(site.policy(), site.file))
    # Jobs of other users alone cause no such finding.
    site.settings["identities"] = [{"uri": operator_identity("prod"), "user": "nobody"}]
    site.settings["users"] = {"run_dir": f"{site.folder}/scratch/{{user}}/isthmus"}
    site.write()
    assert lines() == []


def test_serve_refuses_and_check_says_why(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    (site.folder / "scratch").chmod(0o777)
    line = f"run_dir: {site.folder}/scratch is writable by everybody; chmod o-w {site.folder}/scratch"
    assert main(["serve", "--policy", str(site.file)]) == 2
    assert f"isthmus-bridge: another user can act as the bridge: {line}" in capsys.readouterr().err
    assert main(["check", "--policy", str(site.file)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert f"problem: {line}" in said
    assert [one for one in said if one.startswith("warning: users: jobs run as ")]


def test_import_paths_that_are_no_folders_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Editable installations add such entries. The working directory may be unreadable."""
    finder = "__editable__.isthmus_bridge-0.1.0.finder.__path_hook__"
    (tmp_path / finder).touch()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", finder, str(tmp_path / "there"), str(tmp_path / "gone"), "\0"])
    found = code_paths()
    assert tmp_path / "there" in found
    assert all(path.is_absolute() for path in found) and tmp_path / "gone" not in found
