"""Pools of local users: a fake sudo, the real helper behind it, and a fake Slurm."""

import json
import logging
import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from isthmus_bridge.files.run_directory import AUDIT_FOLDER
from isthmus_bridge.parties import signing_root
from isthmus_bridge.policy.policy import Policy, PolicyError
from isthmus_bridge.pools.housekeeping import clean_up
from isthmus_bridge.pools.pools import Denied
from isthmus_bridge.slurm.run_as import AsUserError
from isthmus_bridge.users import sudoers, user_checks
from isthmus_bridge.users.doctor import changeable
from isthmus_bridge.users.helper import PROTOCOL, Helper, respond
from isthmus_bridge.users.helper_client import AsUser
from isthmus_bridge.users.pool_directory import pool_directory
from isthmus_contracts.identities import AUDIT_FILE, SIGNING_KEY_FILE
from isthmus_contracts.wire.departures import Departure
from isthmus_contracts.wire.parties import Signer, verify
from tests.support.fake_slurm import KEY, NAME, OPERATOR, Array, World, policy

from .test_script import NASTY

OTHER = "isthmus://operator/other"
# Two users that exist on every machine.
ALICE, BOB = "daemon", "nobody"
# Runs the helper as the current user, pretending that it is not root.
SUDO = """#!/bin/sh
[ "$1" = --non-interactive ] && [ "$3" = -- ] || exit 99
if [ -e "{folder}/no-rule" ]; then echo 'sudo: a password is required' >&2; exit 1; fi
if [ -e "{folder}/killed" ]; then kill -9 $$; fi
shift 7
exec {python} -c 'import os, runpy, sys
os.getresuid = lambda: (9, 9, 9)
runpy.run_module("isthmus_bridge.users.helper", run_name="__main__")' "$@"
"""


def settings(root: Path) -> dict[str, Any]:
    sudo = root / "sudo"
    sudo.write_text(SUDO.format(folder=root, python=sys.executable))
    sudo.chmod(0o755)
    return {
        "identities": [{"uri": OPERATOR, "user": ALICE}, {"uri": OTHER, "user": BOB}],
        "users": {"run_dir": f"{root}/users/{{user}}", "sudo": str(sudo)},
    }


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, **settings(tmp_path))


@pytest.fixture
def site(tmp_path: Path) -> Policy:
    return policy(tmp_path, **settings(tmp_path))


def test_a_renamed_array_is_cancelled_as_its_user_and_jobs_of_no_pool_are_counted(world: World) -> None:
    world.ensure()
    world.tick()
    (array,) = world.slurm.arrays
    array.name = "better"
    own = Array(900, "of-her-own", ["RUNNING"], [0], world.now, ALICE, f"{array.directory}/work/0")
    world.slurm.arrays.append(own)
    world.tick()
    counted = {"user": ALICE}
    assert world.metrics.registry.get_sample_value("isthmus_bridge_jobs_without_pool", counted) == 1.0
    world.cancel()
    world.tick(times=2)
    assert (array.states, own.states) == (["CANCELLED"] * 3, ["RUNNING"])
    own.states = ["COMPLETED"]
    world.tick()
    assert world.metrics.registry.get_sample_value("isthmus_bridge_jobs_without_pool", counted) == 0.0


def test_a_pools_files_and_jobs_are_the_users(world: World, tmp_path: Path) -> None:
    world.ensure(code={"train.py": b"1"})
    assert world.array().user == ALICE
    files = tmp_path / "users" / ALICE / KEY
    assert {path.name for path in files.iterdir()} == {
        ".isthmus-pool",
        "batch.sh",
        "code",
        "logs",
        "tasks",
        "tls",
        "work",
    }
    assert oct((files / "tls" / "tls.key").stat().st_mode & 0o777) == "0o600"
    assert str(files) in (files / "batch.sh").read_text()
    assert [path.name for path in (tmp_path / "run" / KEY).iterdir()] == [".isthmus-pool", "credentials-of"]
    # A repeated request with newer credentials replaces them.
    renewed = world.pools.ensure(world.identity, KEY, _renewed(world))
    assert renewed.user == ALICE
    assert (files / "tls" / "tls.crt").read_bytes() == RENEWED
    world.cancel()
    world.tick(15, times=2)
    assert world.phase() == "CANCELLED"
    assert not (files / "tls").exists()
    assert [path.name for path in (tmp_path / "run" / KEY).iterdir()] == [".isthmus-pool"]


RENEWED = b"-----BEGIN CERTIFICATE-----\nAB==\n-----END CERTIFICATE-----\n"


def _renewed(world: World) -> Any:
    from tests.support.fake_slurm import spec

    wanted = spec(code={"train.py": b"1"})
    wanted.federation.certificate = RENEWED
    return wanted


@pytest.mark.parametrize("owner", ["", BOB])
def test_another_users_array_of_that_name_is_not_the_pools(world: World, owner: str) -> None:
    stranger = Array(7, NAME, ["RUNNING"], [0], world.now, owner)
    world.slurm.arrays.append(stranger)
    world.slurm.script = ["lost"]
    world.ensure()
    world.tick(15, times=5)
    (mine,) = (array for array in world.slurm.arrays if array.user == ALICE)
    assert (world.entry().array_id, world.phase()) == (mine.id, "PENDING")
    world.cancel()
    world.tick(15, times=2)
    # This also holds after the pool's end, when late arrays of the pool are cancelled.
    world.tick(40, times=3)
    assert world.phase() == "CANCELLED" and not mine.lives and stranger.lives


def test_the_users_own_second_array_is_cancelled(world: World) -> None:
    world.ensure()
    world.slurm.arrays.append(Array(7, NAME, ["RUNNING"], [0], world.now, ALICE))
    world.tick()
    assert world.slurm.living() == [100]


def test_a_caller_whose_local_user_has_changed_is_denied(world: World, tmp_path: Path) -> None:
    world.slurm.script = ["full"]
    world.ensure()
    changed = settings(tmp_path)
    changed["identities"][0]["user"] = BOB
    world.current_policy.replace(policy(tmp_path, **changed))
    world.tick(60)
    assert world.phase() == "FAILED"
    assert world.entry().message == (
        f"policy identities.user: the pool was recorded for '{ALICE}'; now {OPERATOR} is '{BOB}'"
    )
    assert not (tmp_path / "users" / ALICE / KEY / "tls").exists()


@pytest.mark.parametrize(
    ("uid", "why"),
    [
        (None, f"'{ALICE}' is not a user of this machine"),
        (0, f"'{ALICE}' is root (uid 0): jobs never run as root"),
        (os.getuid(), f"'{ALICE}' is "),
    ],
)
def test_unusable_users_are_denied_with_a_reason(
    world: World, monkeypatch: pytest.MonkeyPatch, uid: int | None, why: str
) -> None:
    def found(name: str) -> Any:
        if uid is None:
            raise KeyError(name)
        return type("Passwd", (), {"pw_uid": uid})

    monkeypatch.setattr(user_checks.pwd, "getpwnam", found)
    with pytest.raises(Denied) as caught:
        world.ensure()
    assert str(caught.value).startswith(f"policy identities.user: {why}")
    assert str(caught.value).endswith(f"; the policy maps {OPERATOR} to this user")
    with pytest.raises(PolicyError) as refused:
        user_checks.require(world.policy)
    assert str(refused.value).startswith(f"identities[0].user: {why}") and "\n" not in str(refused.value)


def test_a_pool_of_a_missing_user_is_unknown(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.ensure()
    monkeypatch.setattr("isthmus_bridge.pools.reconciler.uid_of", lambda user: None if user == ALICE else 1)
    world.tick(15, times=20)
    assert (world.phase(), world.pool().message) == (
        "UNKNOWN",
        f"the local user {ALICE} is not known on the bridge's machine",
    )
    monkeypatch.undo()
    world.tick()
    assert world.phase() == "PENDING"


def test_without_the_rule_nothing_starts_and_credentials_are_removed_later(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = tmp_path / "no-rule"
    missing.touch()
    with pytest.raises(OSError, match=f"as the local user {ALICE}: sudo: a password is required"):
        world.ensure()
    missing.unlink()
    world.ensure()
    missing.touch()
    world.cancel()
    world.tick(15, times=2)
    assert world.phase() == "CANCELLED"
    assert f"cannot remove the pool's credentials: as the local user {ALICE}: sudo: a password" in caplog.text
    credentials = tmp_path / "users" / ALICE / KEY / "tls"
    assert credentials.exists()
    missing.unlink()
    assert world.journal is not None
    clean_up(world.policy, world.journal, world.auditor, world.now)
    assert not credentials.exists()


def test_a_users_pool_has_its_keys_and_its_lines_are_collected(world: World, tmp_path: Path) -> None:
    root, _ = signing_root.make(tmp_path)
    (tmp_path / "tls").mkdir()
    signing_root.install(tmp_path, tmp_path / "tls")
    world.ensure()
    files = tmp_path / "users" / ALICE / KEY
    verify(Signer.read(files / "tls").credential, root)
    assert (files / "tls" / SIGNING_KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "run" / KEY / "tls").exists()
    folder = files / "work" / "1" / AUDIT_FOLDER
    folder.mkdir(parents=True)
    lines = [
        Departure(time=1.0, job="5e2b-uid", pool="lumi", index=1, round=number, size=10).line() for number in range(3)
    ]
    (folder / AUDIT_FILE).write_bytes(lines[0] + lines[1])
    world.tick()
    world.array().states = ["RUNNING"] * 3
    world.tick(31)
    (folder / AUDIT_FILE).open("ab").write(lines[2] + b"\xff\n")
    world.array().states = ["COMPLETED"] * 3
    world.tick(15, times=2)
    assert world.phase() == "SUCCEEDED"
    assert not (files / "tls").exists()
    found = [json.loads(line) for line in world.policy.audit_path.read_bytes().splitlines()]
    events = [(record["event"], record.get("round")) for record in found]
    assert events == [
        ("accepted", None), ("left", 0), ("left", 1), ("left", 2), ("malformed", None), ("ended", None),
    ]  # fmt: skip
    assert found[0]["user"] == ALICE


def test_a_forged_answer_about_lines_is_refused(world: World, tmp_path: Path) -> None:
    run = pool_directory(world.policy, KEY, ALICE)
    run.create({})
    for answer in ('{"0": [0]}', '{"0": ["x", "AA=="]}', '{"0": [0, "?"]}', "[]", '{"x": [0, "AA=="]}', '{"0": 1}'):
        sudo = tmp_path / "sudo"
        sudo.write_text(f"#!/bin/sh\nprintf '%s' '{{\"result\": {answer}}}'\n")
        with pytest.raises(AsUserError, match="malformed"):
            run.departures({}, frozenset(), 10, 10)
    sudo.write_text(
        """#!/bin/sh\nprintf '%s' '{"result": {"-1": [0, "AAAA"], "3": [-5, "AAAA"], "4": [0, "AA=="]}}'\n"""
    )
    assert run.departures({}, frozenset({4}), 2, 10) == {3: (0, b"\0\0")}


def test_what_an_unrecorded_request_left_is_removed_and_a_lost_journal_finds_its_pool(
    world: World, tmp_path: Path
) -> None:
    left = pool_directory(world.policy, "0" * 32, BOB)
    left.create({"tls.key": b"x"})
    world.ensure()
    assert world.journal is not None
    clean_up(world.policy, world.journal, world.auditor, time.time() + 120)
    assert not left.path.exists() and not left.guard.exists()
    world.journal.close()
    world.journal = None
    world.policy.journal_path.unlink()
    world.boot()
    assert world.ensure().state.name == "UNKNOWN", "a script is there: it may have been submitted"
    world.tick(15)
    assert world.entry().array_id == 100 and world.slurm.submissions == 1


def test_the_end_of_a_log_is_reported(world: World, tmp_path: Path) -> None:
    world.ensure()
    (tmp_path / "users" / ALICE / KEY / "logs" / "1.log").write_text("one\nlast words\n")
    world.array().states[1] = "FAILED"
    world.tick()
    assert [task.log_tail for task in world.pool().tasks] == ["one\nlast words"]
    assert world.pools.tail(world.entry(), 1, 1, 100) == "last words"


# -- the helper


def asked(root: Path, **request: Any) -> dict[str, Any]:
    whole = {"protocol": PROTOCOL, "deadline": time.time() + 60, "key": KEY, **request}
    answer = respond(Helper(root, root.parent / "bin", None), json.dumps(whole).encode())
    assert len(answer) == 1
    return answer


JOB = {
    "tasks": 2, "steps": 1, "at_once": 0, "comment": "isthmus a/b/c", "partition": "main", "account": "", "qos": "",
    "time_limit_seconds": 60, "warning_seconds": 5, "cpus_per_task": 1, "memory_mib": 5, "gres": [["gpu", "", 1]],
    "options": {},
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "scancel"):
        (programs / name).write_text('#!/bin/sh\nprintf "%s\\n" "${0##*/}" "$@" "$HOME"\n')
        (programs / name).chmod(0o755)
    return tmp_path / "pools"


def test_the_helper_makes_the_command_lines_itself(root: Path) -> None:
    answer = asked(root, do="submit", job=JOB)["result"]
    assert answer["status"] == 0
    program, *options, script, home = answer["output"].splitlines()
    assert (program, script, home) == ("sbatch", f"{root}/{KEY}/batch.sh", pwd.getpwuid(os.getuid()).pw_dir)
    assert {f"--job-name={NAME}", f"--chdir={root}/{KEY}", f"--output={root}/{KEY}/logs/%a.log"} <= set(options)
    own = {**JOB, "account": "abc@v100", "options": {"constraint": "a100&nvme", "memory": "none", "exclusive": "yes"}}
    given = asked(root, do="submit", job=own)["result"]["output"].splitlines()
    assert {"--account=abc@v100", "--constraint=a100&nvme", "--exclusive"} <= set(given)
    assert not [option for option in given if option.startswith("--mem")]
    answer = asked(root, do="cancel", name=NAME, array=9, first=2, last=3)["result"]
    assert answer["output"].splitlines()[:-1] == ["scancel", f"--user={os.getuid()}", f"--name={NAME}", "9_[2-3]"]


HOSTILE = st.one_of(NASTY.filter(bool), st.just("../x"), st.just("a b"), st.just("--wrap=id"), st.just("a\n"))


@given(
    field=st.sampled_from(["key", "partition", "account", "qos", "comment", "gres", "tasks", "file", "options"]),
    value=HOSTILE,
)
@example(field="comment", value="%j")
def test_hostile_requests_are_refused(tmp_path_factory: pytest.TempPathFactory, field: str, value: str) -> None:
    root = tmp_path_factory.getbasetemp() / "hostile" / "pools"
    root.parent.mkdir(exist_ok=True)
    if field == "key":
        answer = asked(root, do="create", key=value, files={})
    elif field == "file":
        answer = asked(root, do="create", files={value: ""})
    else:
        changed = [[value, "", 1]] if field == "gres" else {"constraint": value} if field == "options" else value
        answer = asked(root, do="submit", job={**JOB, field: changed})
    # Some of the values are harmless as a comment; in any case the programs do not exist.
    harmless = field == "comment" and value in ("-rf", "--", "../x", "a b")
    assert "refused" in answer or harmless, answer


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root.mkdir(), root.chmod(0o755)), "must be a directory that this user owns, with mode 0700"),
        (lambda root: root.symlink_to(root.parent), "must be a directory that this user owns"),
        (lambda root: root.parent.joinpath("pools").touch(), "File exists"),
    ],
)
def test_the_helper_uses_no_directory_that_others_may_enter(
    root: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(root)
    answer = asked(root, do="create", files={})
    assert message in next(iter(answer.values()))


def test_the_helper_refuses_what_comes_late_and_what_another_version_asks(root: Path) -> None:
    assert asked(root, do="submit", job=JOB, deadline=time.time() - 1) == {"refused": "the request came too late"}
    assert "is another version than the running one" in asked(root, do="submit", job=JOB, protocol=99)["refused"]
    assert asked(root, do="spawn") == {"refused": "malformed request"}
    assert not (root / KEY).exists()


def test_two_names_of_one_user_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm reports uids only, so the owner of an array would be ambiguous."""
    site = policy(tmp_path, **settings(tmp_path))
    passwd = type("Passwd", (), {"pw_uid": 4711})
    monkeypatch.setattr(user_checks.pwd, "getpwnam", lambda name: passwd)
    assert f"identities[1].user: '{BOB}' is the same user as '{ALICE}' (uid 4711)" in list(user_checks.faults(site))
    with pytest.raises(PolicyError, match="is the same user as"):
        user_checks.require(site)
    same = policy(
        tmp_path, **{**settings(tmp_path), "identities": [{"uri": u, "user": ALICE} for u in (OPERATOR, OTHER)]}
    )
    assert not [fault for fault in user_checks.faults(same) if "same user" in fault], "one name may stand there twice"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be root")
def test_the_helper_never_runs_as_root(tmp_path: Path) -> None:
    argv = [sys.executable, "-I", "-m", sudoers.MODULE, "--run-dir", str(tmp_path)]
    done = subprocess.run(argv, input="{}", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "isthmus-bridge: the helper never runs as root\n")


# -- asking through sudo


def test_whether_the_helper_may_have_started(root: Path, tmp_path: Path) -> None:
    as_user = AsUser(policy(tmp_path, **settings(tmp_path), slurm={"bin_dir": str(root.parent / "bin")}))
    answer = as_user.ask(ALICE, "hello", deadline=time.time() + 60)
    assert (set(answer), answer["sbatch"]) == ({"user", "sbatch"}, str(tmp_path / "bin" / "sbatch"))
    (tmp_path / "no-rule").touch()
    with pytest.raises(AsUserError, match="a password is required") as caught:
        as_user.ask(ALICE, "hello")
    assert not caught.value.begun
    (tmp_path / "no-rule").unlink()
    (tmp_path / "killed").touch()
    with pytest.raises(AsUserError, match=f"as the local user {ALICE}: exit code -9") as caught:
        as_user.ask(ALICE, "hello")
    assert caught.value.begun


# -- the rule


def test_the_fragment_is_valid_and_says_no_more_than_it_must(
    site: Policy, tmp_path: Path, require: Callable[[bool, str], None]
) -> None:
    lines = list(sudoers.fragment(site, "isthmus", user_checks.local_users(site)))
    rules = [line for line in lines if line.startswith("isthmus ")]
    assert rules == [
        f"isthmus ALL = ({user}) NOPASSWD: NOSETENV: {sys.executable} -I -m isthmus_bridge.users.helper"
        f" --run-dir {tmp_path}/users/{user}"
        for user in (ALICE, BOB)
    ]
    visudo = shutil.which("visudo", path="/usr/sbin:/usr/bin:/sbin:/bin")
    require(visudo is not None, "install Debian's package sudo")
    assert visudo is not None
    file = tmp_path / "fragment"
    file.write_text("\n".join(lines) + "\n")
    checked = subprocess.run(
        [visudo, "--check", "--strict", f"--file={file}"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


STRANGE = ["ALL", "#0", "%wheel", "+net", "root", "-u", "..", "a b", "a,b", "a=b", "alice\n", "Alice", "alice$"]


@given(value=st.one_of(NASTY, st.sampled_from(STRANGE), st.text(max_size=40)))
def test_hostile_names_of_users_are_refused_or_are_one_word_of_the_rule(
    tmp_path_factory: pytest.TempPathFactory, value: str
) -> None:
    root = tmp_path_factory.getbasetemp()
    try:
        site = policy(root, identities=[{"uri": OPERATOR, "user": value}], users={"run_dir": "/scratch/{user}/isthmus"})
    except PolicyError as error:
        assert str(error).startswith("identities[0].user: ")
        return
    assert (
        value.isascii()
        and value[0] in "abcdefghijklmnopqrstuvwxyz_"
        and not set(value) & set(" \t\n,:=\\*?[]!\"'()#%/")
    )
    assert sudoers.command(site, value)[2] == f"--user={value}"
    assert sudoers.run_dir(site, value).parts == ("/", "scratch", value, "isthmus")


LISTING = """Matching Defaults entries for isthmus on login1:
    env_reset, mail_badpass

User isthmus may run the following commands on login1:
"""


def test_what_sudo_allows_beyond_the_rule(site: Policy) -> None:
    users = user_checks.local_users(site)
    mine = [f"    ({user}) NOSETENV: NOPASSWD: {' '.join(sudoers.helper(site, user))}\n" for user in users]
    assert sudoers.surplus(LISTING + "".join(mine), site, users) == []
    for more in (
        "(ALL : ALL) ALL", "(root) NOPASSWD: /usr/bin/less", f"({BOB}) {' '.join(sudoers.helper(site, ALICE))}",
        f"({ALICE}) {' '.join(sudoers.helper(site, ALICE))} *", "something else",
        f"({ALICE}) {' '.join(sudoers.helper(site, ALICE))}, /bin/sh",
    ):  # fmt: skip
        assert sudoers.surplus(f"{LISTING}{''.join(mine)}    {more}\n", site, users) == [more]


def test_what_others_than_root_may_change_is_found(tmp_path: Path) -> None:
    assert changeable([Path("/usr/bin/env"), Path("/")]) is None
    loose = tmp_path / "bin" / "python"
    loose.parent.mkdir()
    loose.touch()
    loose.parent.chmod(0o777)
    assert changeable([loose]) in (loose.parent, loose, *loose.parents)
    link = tmp_path / "link"
    link.symlink_to(loose)
    assert changeable([link]) is not None


def test_log_lines_name_the_user(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        world.ensure()
    assert [getattr(record, "user", None) for record in caplog.records if record.message == "recorded"] == [ALICE]
