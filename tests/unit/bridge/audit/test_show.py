"""`isthmus-bridge audit`: the table, the JSON lines, and the verification."""

import json
from pathlib import Path

import pytest

from isthmus_bridge.audit.log import AuditLog
from isthmus_bridge.cli import main
from tests.support.fake_slurm import OPERATOR


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return the policy's file of a site with a log of four records."""
    file = tmp_path / "policy.yaml"
    file.write_text(
        f"site: test\nrun_dir: {tmp_path}/run\njournal: {tmp_path}/journal.db\ntls_dir: {tmp_path}/tls\n"
        f"identities: [{{uri: '{OPERATOR}'}}]\nenvironments: {{plain: {{prefix: [env]}}}}\n"
    )
    log = AuditLog(tmp_path / "audit.jsonl", lambda: 1_796_016_000.25)
    where = {"key": "k1", "job": "default/digits", "job_uid": "u1", "pool": "lumi"}
    log.append("accepted", caller=OPERATOR, **where, replicas=2, user="")
    log.append("denied", caller=OPERATOR, key="k2", job="default/other", pool="lumi", rule="drain", message="a b")
    log.append("left", reported_by="client", **where, index=1, round=3, size=100, decision="sent")
    log.append("ended", **where, state="FAILED", message="bad \x1b]0;title\x07 " + "x" * 500)
    log.close()
    return file


def audit(site: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = main(["audit", "--policy", str(site), *options])
    shown = capsys.readouterr()
    return code, (shown.out + shown.err).splitlines()


def test_the_table_shows_each_record_in_one_printable_line(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = audit(site, capsys)
    assert code == 0
    assert lines[0].split() == ["TIME", "EVENT", "JOB", "CLIENT", "DETAILS"]
    assert lines[1].split()[:4] == ["2026-11-30T05:20:00.250Z", "accepted", "default/digits", "lumi"]
    assert lines[1].endswith(f"caller={OPERATOR} replicas=2")
    assert lines[2].endswith('rule=drain message="a b"')
    assert lines[3].split()[3:] == ["lumi/1", "round=3", "size=100", "decision=sent"]
    assert lines[4].endswith("…")
    assert all(line.isprintable() for line in lines)


def test_records_are_selected_by_job_key_and_event(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def events(*options: str) -> list[str]:
        return [json.loads(line)["event"] for line in audit(site, capsys, "--json", *options)[1]]

    assert events() == ["accepted", "denied", "left", "ended"]
    assert events("--job", "default/digits") == events("--job", "u1") == ["accepted", "left", "ended"]
    assert events("--key", "k2") == ["denied"]
    assert events("--event", "left") == ["left"]


def test_the_verification_says_what_is_wrong(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = site.parent / "audit.jsonl"
    code, lines = audit(site, capsys, "--verify")
    assert (code, lines[0]) == (0, f"{path}: 4 records, each follows the one before")
    noted = lines[1].removeprefix("hash of the last line: ")
    assert audit(site, capsys, "--hash", noted)[0] == 0
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:3]))
    code, lines = audit(site, capsys, "--hash", noted)
    assert (code, lines) == (1, [f"problem: no line has the hash {noted}: the log was cut off or written anew"])
    path.write_bytes(b"".join([whole[0], whole[2], whole[3]]))
    code, lines = audit(site, capsys, "--verify")
    assert code == 1
    assert lines == ["problem: line 2: does not follow line 1: lines were changed, removed or inserted here"]


def test_a_log_that_cannot_be_read_is_one_line(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site.parent / "audit.jsonl").unlink()
    for options in ([], ["--json"], ["--verify"]):
        code, lines = audit(site, capsys, *options)
        assert (code, len(lines)) == (1, 1)
        assert lines[0].endswith("audit.jsonl: does not exist; the bridge has never run with this policy")
