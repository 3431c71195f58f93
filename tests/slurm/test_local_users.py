"""Callers mapped to local users: real sudo, real Slurm, and a bridge that runs as an ordinary user."""

import json
import pwd
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from isthmus_bridge.users.helper import PROTOCOL
from isthmus_contracts.identities import slurm_job_name
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb import bridge_pb2_grpc as rpc

from .local_users import ALICE, BOB, Rule, accounts, as_user, prepare
from .slurm_site import (
    Site,
    ensure,
    get,
    over,
    restart_while_submitting,
    running,
    slurm,
    spec,
    tail,
    until,
    wait_for_output,
)

if TYPE_CHECKING:
    from lab import Lab


@pytest.fixture
def shared(site: Site, lab: "Lab", require: Callable[[bool, str], None]) -> Iterator[Site]:
    """Yield a site with local users, with the rule that `isthmus-bridge sudoers` prints."""
    require(shutil.which("sudo") is not None, "install Debian's package sudo")
    with accounts():
        prepare(site, lab.slurm_conf)
        status, fragment = site.command("sudoers")
        assert status == 0, fragment
        rule = Rule(fragment)
        try:
            checked = subprocess.run(["visudo", "--check"], capture_output=True, text=True, check=False)
            assert checked.returncode == 0, checked.stdout + checked.stderr
            yield site
            # Users can be removed only once none of their processes runs.
            site.end_jobs()
        finally:
            rule.remove()


@pytest.fixture
def alice(shared: Site) -> rpc.BridgeStub:
    """Start the bridge, and return the stub of the caller mapped to alice."""
    return shared.start()


@pytest.fixture
def bob(shared: Site, alice: rpc.BridgeStub) -> rpc.BridgeStub:
    """Return the stub of the caller mapped to bob."""
    return shared.stub("other")


def owners(key: str) -> set[str]:
    """Return the owners of the key's live jobs, as squeue shows them."""
    return set(slurm("squeue", "-h", f"--name={slurm_job_name(key)}", "-O", "UserName:40").split())


def home_of(site: Site, user: str, key: str) -> Path:
    return site.folder / "users" / user / key


def refused(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()


def test_each_caller_becomes_its_local_user(shared: Site, alice: rpc.BridgeStub, bob: rpc.BridgeStub) -> None:
    hers, his = shared.key(), shared.key()
    script = ["sh", "-c", 'echo "I am $(id -un), $HOME, $(wc -c <"$ISTHMUS_TLS_DIR/tls.key")"; exec sleep 300']
    wanted = spec(command=script, code={"train.py": b"print(1)"})
    ensure(alice, hers, wanted)
    ensure(bob, his, spec(command=script))
    running(alice, hers)
    running(bob, his)
    assert (owners(hers), owners(his)) == ({ALICE}, {BOB})
    size = len(wanted.federation.private_key)
    wait_for_output(alice, hers, 0, f"I am {ALICE}, {pwd.getpwnam(ALICE).pw_dir}, {size}")
    wait_for_output(bob, his, 1, f"I am {BOB}, ")

    # All files are private to their user; the bridge's directory holds none of them.
    files = home_of(shared, ALICE, hers)
    listed = [files, *files.rglob("*")]
    assert {path.stat().st_uid for path in listed} == {pwd.getpwnam(ALICE).pw_uid}
    assert not [path for path in listed if stat.S_IMODE(path.lstat().st_mode) & 0o077]
    assert {stat.S_IMODE(path.stat().st_mode) for path in (files / "tls").iterdir()} == {0o600}
    assert (files / "work" / "0" / "train.py").read_bytes() == b"print(1)"
    own = {path.name for path in (shared.folder / "run" / hers).iterdir()}
    assert own == {"credentials-of", ".isthmus-pool"}
    for path in (files / "tls" / "tls.key", shared.folder / "run" / "journal.db", shared.folder / "policy.yaml"):
        assert as_user(BOB, "cat", str(path)).returncode != 0, path

    # The other caller can neither see nor end the pool.
    assert refused(lambda: get(bob, hers)) is grpc.StatusCode.NOT_FOUND
    assert refused(lambda: tail(bob, hers, 0)) is grpc.StatusCode.NOT_FOUND
    assert refused(lambda: bob.CancelPool(pb.CancelPoolRequest(key=hers), timeout=60)) is grpc.StatusCode.NOT_FOUND
    assert refused(lambda: ensure(bob, hers, wanted)) is grpc.StatusCode.ALREADY_EXISTS
    assert get(alice, hers).running == 2

    alice.CancelPool(pb.CancelPoolRequest(key=hers), timeout=60)
    assert pb.Pool.Phase.Name(over(alice, hers).phase) == "CANCELLED"
    shared.vanish(hers)
    until(lambda: not (files / "tls").exists(), "the credentials are gone with the pool")
    assert owners(his) == {BOB}, "the other's go on"


def test_ends_of_clients_that_share_a_job(shared: Site, alice: rpc.BridgeStub) -> None:
    key = shared.key()
    script = ["sh", "-c", 'echo "last words of $ISTHMUS_INDEX"; exit "$ISTHMUS_INDEX"']
    ensure(alice, key, spec(command=script, replicas=3, first_client=0, clients_per_job=2))
    pool = over(alice, key)
    assert (pb.Pool.Phase.Name(pool.phase), pool.succeeded, pool.failed) == ("FAILED", 1, 2)
    told = {task.index: (task.exit_code, task.log_tail) for task in pool.tasks}
    assert told[1] == (1, "last words of 1") and told[2] == (2, "last words of 2")


@pytest.mark.parametrize("mode", ["slow", "hang-after"])
def test_the_bridge_dies_while_sbatch_runs_as_another_user(shared: Site, mode: str) -> None:
    shared.settings["slurm"]["command_timeout_seconds"] = 10
    alice = shared.start()
    key, wanted = shared.key(), spec()
    alice = restart_while_submitting(shared, alice, key, wanted, mode)
    assert shared.arrays(key) == {get(alice, key).slurm_job_id}
    assert owners(key) == {ALICE}


def test_an_sbatch_that_hangs_as_another_user_is_ended_and_tried_again(shared: Site) -> None:
    shared.settings["slurm"]["command_timeout_seconds"] = 3
    alice = shared.start()
    key = shared.key()
    shared.mode("hang-before")
    ensure(alice, key, spec())
    until(lambda: (p := get(alice, key)).phase == pb.Pool.UNKNOWN and "in time" in p.message, "the bridge says so")
    shared.mode("")
    running(alice, key)
    assert shared.arrays(key) == {get(alice, key).slurm_job_id}


def test_another_users_job_of_that_name_is_neither_adopted_nor_cancelled(shared: Site) -> None:
    """The look-up of a doubtful submission goes by name and owner.

    The other jobs belong to the other mapped user and to the bridge's own user.
    """
    shared.settings["slurm"]["command_timeout_seconds"] = 5
    alice = shared.start()
    key = shared.key()
    name = slurm_job_name(key)
    bridge_user = shared.folder.owner()
    strangers = {}
    for user in (BOB, bridge_user):
        argv = ["sbatch", "--parsable", f"--job-name={name}", "--array=0-1", "--mem=10M", "--chdir=/",
                "--output=/dev/null", "--wrap=sleep 600"]  # fmt: skip
        strangers[user] = as_user(user, *argv, check=True).stdout.strip()
    shared.mode("fail-before")
    ensure(alice, key, spec())
    until(lambda: get(alice, key).phase == pb.Pool.UNKNOWN, "the submission is in doubt")
    shared.mode("")
    running(alice, key)
    mine = get(alice, key).slurm_job_id
    assert mine not in strangers.values()
    alice.CancelPool(pb.CancelPoolRequest(key=key), timeout=60)
    assert pb.Pool.Phase.Name(over(alice, key).phase) == "CANCELLED"
    until(lambda: mine not in shared.arrays(key), "the pool's own is gone")
    assert shared.arrays(key) == set(strangers.values())


def test_the_rule_permits_nothing_else(shared: Site, alice: rpc.BridgeStub) -> None:
    """sudo refuses the bridge's user everything but the helper."""
    status, said = shared.command("doctor")
    lines = [line for line in said.splitlines() if "local user" in line or "sudo" in line]
    assert [line.startswith("ok ") for line in lines] == [True] * 4, said
    bridge_user = shared.folder.owner()
    rules = as_user(bridge_user, "sudo", "-n", "-l", check=True).stdout.splitlines()
    allowed = [line.strip(" (").partition(") ") for line in rules if "(" in line]
    assert all(tags.startswith("NOSETENV: NOPASSWD: ") for _, _, tags in allowed)
    helper = {user: tags.rpartition(": ")[2].split() for user, _, tags in allowed}
    assert set(helper) == {ALICE, BOB}

    def attempt(*argv: str) -> str:
        done = as_user(bridge_user, "sudo", "-n", *argv)
        assert done.returncode != 0, done.stdout
        return done.stderr

    mine, python = helper[ALICE], helper[ALICE][0]
    for user, command in (
        (ALICE, ["/bin/sh", "-c", "id"]),
        (ALICE, ["/usr/bin/sbatch", "--wrap=id"]),
        (ALICE, ["/usr/bin/scancel", f"--user={ALICE}"]),
        (ALICE, [python]),
        (ALICE, [python, "-I", "-c", "import os; os.system('id')"]),
        (ALICE, mine[:4]),
        (ALICE, [*mine, "--run-dir", "/etc"]),
        (ALICE, [word.replace(ALICE, BOB) for word in mine]),
        (BOB, mine),
        ("root", mine),
        ("root", ["/bin/sh"]),
        (pwd.getpwnam("nobody").pw_name, mine),
    ):
        assert "a password is required" in attempt("-u", user, "--", *command), command
    assert "not allowed to set" in attempt("-u", ALICE, "PYTHONPATH=/tmp", *mine)
    # Requests that the helper refuses, sent as the bridge sends them.
    for request, answer in (
        ({"do": "create", "key": "../../etc", "files": {}}, "malformed key"),
        ({"do": "create", "key": "abcdefgh", "files": {"../x": ""}}, "malformed value"),
        ({"do": "shell", "key": "abcdefgh"}, "malformed request"),
        ({"do": "cancel", "name": "isthmus-abcdefgh", "array": "--me", "first": 0, "last": None}, "malformed number"),
    ):
        assert _ask(bridge_user, [*mine], request) == {"refused": answer}

    # The doctor reports a rule that allows too much.
    wide = Rule(f"{bridge_user} ALL = ({BOB}) NOPASSWD: /usr/bin/true\n")
    try:
        status, said = shared.command("doctor")
    finally:
        wide.remove()
    assert status == 1 and "sudo: allows this user more than the bridge needs: " in said and "/usr/bin/true" in said


def test_without_the_rule_nothing_is_lost(shared: Site, alice: rpc.BridgeStub) -> None:
    key = shared.key()
    ensure(alice, key, spec())
    running(alice, key)
    rules = [path for path in Path("/etc/sudoers.d").glob("isthmus-test-*") if ALICE in path.read_text()]
    kept = {path: path.read_text() for path in rules}
    for path in rules:
        path.unlink()
    try:
        other = shared.key()
        with pytest.raises(grpc.RpcError) as caught:
            ensure(alice, other, spec())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "a password is required" in (caught.value.details() or "")
        assert get(alice, key).running == 2
        status, said = shared.command("doctor")
        assert status == 1 and f"PROBLEM  local user {ALICE}: " in said
    finally:
        for path, text in kept.items():
            path.write_text(text)
    ensure(alice, other, spec())
    running(alice, other)


def _ask(user: str, helper: list[str], request: dict[str, object]) -> object:
    content = json.dumps({"protocol": PROTOCOL, "deadline": time.time() + 60, **request})
    argv = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"]
    argv += ["sudo", "-n", "-u", ALICE, "--", *helper]
    done = subprocess.run(argv, input=content, capture_output=True, text=True, timeout=60, check=True, cwd="/")
    return json.loads(done.stdout)
