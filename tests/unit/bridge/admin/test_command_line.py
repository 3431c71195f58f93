import errno
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from isthmus_bridge.cli import main
from isthmus_bridge.policy.policy import load
from isthmus_bridge.pools.status_file import StatusFile
from isthmus_contracts.wire.pki import Credentials
from tests.support.fake_slurm import KEY, OPERATOR, World


def policy_file(folder: Path, **changes: object) -> Path:
    content = {
        "site": "lumi",
        "run_dir": str(folder / "run"),
        "tls_dir": str(folder / "certs" / "server"),
        "identities": [{"uri": "isthmus://operator/prod", "namespaces": ["team-*"]}],
        "partitions": ["main", "debug"],
        "environments": {"venv": {"venv": "/usr"}},
        "slurm": {"bin_dir": str(folder / "bin")},
        **changes,
    }
    path = folder / "policy.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_certificates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "certs"
    arguments = ["certs", "--dir", str(folder), "--host", "login1.example", "--operator", "prod"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "isthmus://operator/prod" in said and "login1.example" in said
    assert oct((folder / "ca.key").stat().st_mode & 0o777) == "0o600"
    authority = (folder / "ca.crt").read_bytes()
    for name in ("server", "operator-prod"):
        assert Credentials.read(folder / name).ca == authority
    assert main(["certs", "--dir", str(folder), "--operator", "second"]) == 0
    assert (folder / "ca.crt").read_bytes() == authority, "the authority must stay"
    assert Credentials.read(folder / "operator-second").ca == authority
    assert main(["certs", "--dir", str(folder), "--operator", "a/../b"]) == 2
    assert main(["certs", "--dir", str(folder)]) == 2


def test_a_new_authority_takes_over_step_by_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each end can verify the other at every step.

    tests/integration/operator/test_bridge_channels.py does the same over TLS.
    """
    folder = tmp_path / "certs"
    server, operator = folder / "server", folder / "operator-prod"

    def certs(*options: str) -> int:
        return main(["certs", "--dir", str(folder), *options])

    def signer(of: Path) -> str:
        return x509.load_pem_x509_certificate((of / "tls.crt").read_bytes()).issuer.rfc4514_string()

    def trusted(by: Path) -> list[str]:
        found = x509.load_pem_x509_certificates((by / "ca.crt").read_bytes())
        return [one.subject.rfc4514_string() for one in found]

    assert certs("--host", "login1.example", "--operator", "prod") == 0
    (old,) = trusted(server)
    assert certs("--new-ca", "--host", "login1.example") == 2
    assert certs("--new-ca", "--operator", "prod") == 0
    assert "keeps its certificate for now" in capsys.readouterr().out
    new, *rest = trusted(server)
    assert (rest, new != old) == ([old], True)
    assert (signer(server), signer(operator)) == (old, new)
    assert trusted(operator) == trusted(folder) == [new, old]
    assert certs("--host", "login1.example") == 0
    assert (signer(server), trusted(server)) == (new, [new, old])
    assert certs("--only-this-ca", "--operator", "prod") == 0
    assert trusted(server) == trusted(operator) == trusted(folder) == [new]
    assert (signer(server), signer(operator)) == (new, new)


def test_check_explains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["certs", "--dir", str(tmp_path / "certs"), "--host", "localhost", "--operator", "prod"])
    capsys.readouterr()
    path = policy_file(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho 'squeue: error: no controller' >&2\nexit 1\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    assert main(["check", "--policy", str(path), "--identity", "isthmus://operator/prod"]) == 1
    said = capsys.readouterr().out
    assert "namespaces: team-*" in said and "partitions: main, debug (default: main)" in said
    assert "problem: slurm: squeue failed: squeue: error: no controller" in said
    main(["check", "--policy", str(path), "--identity", "isthmus://operator/none"])
    assert "isthmus://operator/none may do nothing" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["serve", "check", "doctor", "status"])
def test_a_bad_policy_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    path = policy_file(tmp_path, partitions=["--help"], colour="red")
    assert main([command, "--policy", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith(f"isthmus-bridge: {path}: ") and "colour: unknown field" in line and "partitions[0]: " in line
    )


def test_check_reports_paths_that_this_user_cannot_access(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def guarded(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path.is_relative_to("/closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", guarded)
    path = policy_file(
        tmp_path, environments={"v": {"venv": "/closed/v"}, "a": {"apptainer": "/nowhere/x.sif"}},
        data_sets={"d": "/closed/d"}, run_dir="/closed/run", gateways=[{"address": "g:1", "ca": "/closed/ca.crt"}],
    )  # fmt: skip
    assert main(["check", "--policy", str(path)]) == 1
    said = capsys.readouterr().out
    for name, file in (
        ("environments.v", "/closed/v"),
        ("data_sets.d", "/closed/d"),
        ("run_dir", "/closed/run"),
        ("gateways[0].ca", "/closed/ca.crt"),
    ):
        assert f"problem: {name}: {file} is not accessible to this user: Permission denied\n" in said
    assert "problem: environments.a: /nowhere/x.sif does not exist on this machine\n" in said


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("retention_days: 2024-13-45", "not YAML: month must be in 1..12"),
        ("site: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("partitions: [main]\nlimits: {replicas: 8}\nlimits: {pools: 3}", "line 3: 'limits' is already set in line 2"),
        ("limits:\n  replicas: 8\n  'replicas': 900", "line 3: 'replicas' is already set in line 2"),
        ("a: 1\nb: [", "not YAML: while parsing"),
    ],
    ids=["date", "depth", "twice", "twice-below", "syntax"],
)
def test_a_file_that_is_no_policy_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    assert main(["check", "--policy", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"isthmus-bridge: {path}: {complaint}")


def test_a_mapping_may_be_merged_into_another_and_overrule_it(tmp_path: Path) -> None:
    path = policy_file(tmp_path)
    path.write_text(
        path.read_text().replace("environments:\n  venv:\n    venv: /usr\n", "")
        + "environments:\n  a: &a {venv: /a, setup: ['true']}\n  b: &b {<<: *a, venv: /b}\n  c: {<<: *b, venv: /c}\n"
    )
    found = load(path).environments
    assert {name: (str(one.venv), one.setup) for name, one in found.items()} == {
        name: (f"/{name}", ["true"]) for name in "abc"
    }


@pytest.mark.parametrize("days", ["0", "-3", "3651", "100000000"])
def test_certificates_of_no_sensible_lifetime(tmp_path: Path, capsys: pytest.CaptureFixture[str], days: str) -> None:
    assert main(["certs", "--dir", str(tmp_path / "certs"), "--operator", "prod", "--days", days]) == 2
    assert capsys.readouterr().err == f"isthmus-bridge: --days: must be from 1 to 3650 (the CA's life), not {days}\n"
    assert not (tmp_path / "certs").exists()


def test_a_journal_that_cannot_be_created_is_reported_with_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    journal = tmp_path / "file" / "journal.db"
    assert main(["serve", "--policy", str(policy_file(tmp_path, journal=str(journal)))]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"isthmus-bridge: journal {journal}: ") and "run_dir" not in said


def test_an_audit_log_that_cannot_be_created_is_reported_with_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    log = tmp_path / "file" / "audit.jsonl"
    assert main(["serve", "--policy", str(policy_file(tmp_path, audit_log=str(log)))]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"isthmus-bridge: audit_log {log}: File exists"


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"time": 1, "pid": 2, "pools": [{"key": "k"}]}', '{"time": "x", "pid": 2, "pools": []}',
     '{"time": 1, "pid": 2, "pools": [7]}', "not JSON"],
)  # fmt: skip
def test_a_status_of_another_bridge_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = policy_file(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text(content)
    assert main(["status", "--policy", str(path)]) == 1
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"isthmus-bridge: {tmp_path / 'run' / 'status.json'}: ") and said.out == ""


def test_serve_without_certificates_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["serve", "--policy", str(policy_file(tmp_path)), "--listen", "127.0.0.1:0", "--metrics-listen", "off"])
        == 1
    )
    assert capsys.readouterr().err.splitlines()[-1].startswith("isthmus-bridge: cannot serve with ")


def test_status_shows_what_the_bridge_wrote_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = policy_file(tmp_path)
    assert main(["status", "--policy", str(path)]) == 1
    assert "the bridge has never run with this policy" in capsys.readouterr().err
    world = World(tmp_path)
    world.ensure()
    world.slurm.arrays[0].states = ["RUNNING", "PENDING", "FAILED"]
    world.tick()
    (tmp_path / "run").mkdir(exist_ok=True)
    file = StatusFile(tmp_path / "run" / "status.json")
    file.update([world.entry()], time.time())
    assert main(["status", "--policy", str(path)]) == 0
    head, columns, row = capsys.readouterr().out.splitlines()
    assert head.startswith("the bridge is running (pid ") and head.endswith("; 1 live pools")
    assert columns.split() == [
        "KEY",
        "POOL",
        "CALLER",
        "USER",
        "PHASE",
        "JOB",
        "QUEUED",
        "RUNNING",
        "DONE",
        "FAILED",
        "SINCE",
        "WHY",
    ]
    assert row.split()[:10] == [KEY, "default/fashion/lumi", OPERATOR, "-", "RUNNING", "100", "1", "1", "0", "1"]
    assert row.endswith("task 2: FAILED")
    assert oct((tmp_path / "run" / "status.json").stat().st_mode & 0o777) == "0o600"
    file.update([replace(world.entry(), user="alice", version=99)], time.time())
    main(["status", "--policy", str(path)])
    assert capsys.readouterr().out.splitlines()[2].split()[2:4] == [OPERATOR, "alice"]
    file.update([], time.time() - 1000)
    main(["status", "--policy", str(path)])
    assert "is not running, or hangs" in capsys.readouterr().out
    assert world.journal is not None
    world.journal.close()


def test_doctor_without_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = policy_file(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "squeue", "scancel", "scontrol", "sacct", "sinfo"):
        (programs / name).write_text('#!/bin/sh\necho "$0: no controller" >&2\nexit 1\n')
        (programs / name).chmod(0o755)
    assert main(["doctor", "--policy", str(path)]) == 1
    line, *others, root = capsys.readouterr().out.splitlines()
    assert root.startswith("note     secure aggregation: this site has no root")
    # Adapters that are not in use are reported too, and are not problems.
    assert [other.startswith("ok  ") for other in others] == [True, True]
    assert "REST adapter (not in use): not configured; set slurm.rest" in others[0]
    assert "pyslurm adapter (not in use): does not work: pyslurm: describe: cannot import pyslurm" in others[1]
    assert line.startswith("PROBLEM  CLI adapter (in use): does not work: scontrol failed")
    assert line.endswith("no controller")
    assert main(["doctor", "--policy", str(path), "--connect", "127.0.0.1:1"]) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "PROBLEM  gateway 127.0.0.1:1: cannot be reached: Connection refused"
    assert main(["serve", "--policy", str(path), "--connect", "nowhere"]) == 2
    assert "gateways[0].address: 'nowhere' is not HOST:PORT" in capsys.readouterr().err


USERS = {
    "identities": [
        {"uri": "isthmus://operator/prod", "user": "daemon"},
        {"uri": "isthmus://operator/two", "user": "bin"},
    ],
    "users": {"run_dir": "/scratch/{user}/isthmus"},
    "slurm": {},
}


def test_sudoers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = policy_file(tmp_path, **USERS)
    assert main(["sudoers", "--policy", str(path), "--bridge-user", "isthmus"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rules = [line for line in lines if line.startswith("isthmus ALL = ")]
    assert [line.partition(")")[0] for line in rules] == ["isthmus ALL = (daemon", "isthmus ALL = (bin"]
    assert all("*" not in line and "ALL)" not in line for line in rules)
    for name in ("root", "ALL", "a b", "%wheel"):
        assert main(["sudoers", "--policy", str(path), "--bridge-user", name]) == 2
        assert "is not an ordinary user" in capsys.readouterr().err
    plain = policy_file(tmp_path)
    assert main(["sudoers", "--policy", str(plain), "--bridge-user", "isthmus"]) == 1
    assert "no identity names a local user" in capsys.readouterr().err


def test_check_shows_the_local_user_of_a_caller_and_its_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = policy_file(tmp_path, **USERS)
    path.chmod(0o644)
    assert main(["check", "--policy", str(path), "--identity", "isthmus://operator/prod"]) == 1
    said = capsys.readouterr().out
    assert "  as the local user daemon (uid 1), with its files in /scratch/daemon/isthmus" in said
    line = f"problem: policy: other users can read {path} and so the site's rules"
    assert f"{line}; chgrp it to the bridge's group, chmod 640" in said
    lost = {**USERS, "identities": [{"uri": "isthmus://operator/prod", "user": "no-such-user"}]}
    path = policy_file(tmp_path, **lost)
    main(["check", "--policy", str(path)])
    assert "problem: identities[0].user: 'no-such-user' is not a user of this machine" in capsys.readouterr().out
    assert main(["serve", "--policy", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "isthmus-bridge: identities[0].user: 'no-such-user' is not a user of this machine"
    path = policy_file(tmp_path, **{**USERS, "identities": [{"uri": "isthmus://operator/prod", "user": "root"}]})
    assert main(["check", "--policy", str(path)]) == 2
    assert "identities[0].user: 'root' is refused: jobs never run as root" in capsys.readouterr().err


def test_a_proxy_goes_with_a_gateway(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = policy_file(tmp_path)
    assert main(["doctor", "--policy", str(path), "--proxy", "http://proxy:3128"]) == 2
    assert "--proxy needs --connect" in capsys.readouterr().err
    assert main(["serve", "--policy", str(path), "--connect", "g:1", "--proxy", "socks5://me:secret@proxy:1"]) == 2
    said = capsys.readouterr().err
    assert "gateways[0].proxy: is not http://HOST:PORT" in said and "secret" not in said
