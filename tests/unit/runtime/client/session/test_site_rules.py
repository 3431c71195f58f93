"""Rules of a client's site for results that leave, and its audit log."""

from pathlib import Path
from typing import Any

import pytest

from isthmus.client.context import Context
from isthmus.client.errors import FederationError
from isthmus.client.session.audit import AuditLog, Results
from isthmus.client.session.site_rules import SiteRules
from isthmus_contracts.identities import AUDIT_FILE, TRUST_FILE
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.wire.departures import Departure
from isthmus_contracts.wire.parties import Trust, new_root

JOB = "5d2c"
TRAIN, EVALUATE, INITIALIZE = pb.Offer.TRAIN, pb.Offer.EVALUATE, pb.Offer.INITIALIZE


def rules(directory: Path, **trust: Any) -> SiteRules:
    if trust:
        roots = {"cloud": new_root()[1]}
        (directory / TRUST_FILE).write_bytes(Trust(roots=roots, **trust).serialized())
    return SiteRules(directory, AuditLog(JOB, Context(pool="pool", index=2), str(directory / "audit")))


def lines(directory: Path) -> list[Departure]:
    path = directory / "audit" / AUDIT_FILE
    read = [Departure.parse(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    found = [line for line in read if line is not None]
    assert len(found) == len(read)
    return found


def offer(kind: "pb.Offer.Kind.ValueType" = TRAIN, *, secure: bool = False, number: int = 1) -> pb.Offer:
    return pb.Offer(kind=kind, round=number, secure=secure)


def test_without_a_trust_file_everything_may_leave(tmp_path: Path) -> None:
    site = rules(tmp_path)
    for kind in (INITIALIZE, TRAIN, EVALUATE, INITIALIZE):
        site.require_protection(offer(kind))
    site.admit(Results("update", 1, 1 << 40, "ab" * 32), ["layer.weight"], 1)
    (line,) = lines(tmp_path)
    assert (line.job, line.pool, line.index, line.round, line.what) == (JOB, "pool", 2, 1, "update")
    assert (line.size, line.sha256, line.protection, line.decision) == (1 << 40, "ab" * 32, "none", "sent")


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_a_site_that_requires_masks_refuses_work_without(tmp_path: Path, kind: "pb.Offer.Kind.ValueType") -> None:
    site = rules(tmp_path, required=True)
    site.require_protection(offer(INITIALIZE))
    site.require_protection(offer(kind, secure=True))
    site = rules(tmp_path)
    with pytest.raises(FederationError, match=r"trust\.json: required.*add spec\.privacy\.secureAggregation") as raised:
        site.require_protection(offer(kind))
    (line,) = lines(tmp_path)
    assert (line.decision, line.reason, line.size) == ("refused", str(raised.value), 0)


def test_an_aggregator_cannot_stop_asking_for_masks(tmp_path: Path) -> None:
    site = rules(tmp_path)
    site.require_protection(offer(secure=True))
    with pytest.raises(FederationError, match="in a job that began with it"):
        site.require_protection(offer(number=2))


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_a_trained_model_does_not_leave_as_initial_weights(tmp_path: Path, kind: "pb.Offer.Kind.ValueType") -> None:
    site = rules(tmp_path, required=True)
    site.require_protection(offer(kind, secure=True))
    with pytest.raises(FederationError, match="in clear, as initial weights, after it was trained"):
        site.require_protection(offer(INITIALIZE))


def test_only_tensors_that_match_a_pattern_leave(tmp_path: Path) -> None:
    site = rules(tmp_path, tensors=["*.lora_?", "head.*"])
    site.admit(Results("update", 1, 8, "ab" * 32, incarnation=7), ["a.lora_A", "head.bias"], 1)
    with pytest.raises(FederationError, match=r"the tensor body\.weight leave .* is \*\.lora_\?, head\.\*\)"):
        site.admit(Results("update", 2, 8, "ab" * 32), ["head.bias", "body.weight"], 2)
    sent, refused = lines(tmp_path)
    assert (sent.protection, sent.incarnation, sent.decision) == ("secure-aggregation", 7, "sent")
    assert (refused.round, refused.decision, refused.size, refused.sha256) == (2, "refused", 0, "")


def test_a_round_has_a_limit_of_bytes_that_resending_does_not_use_up(tmp_path: Path) -> None:
    site = rules(tmp_path, max_bytes_per_round=100)
    for _ in range(3):
        site.admit(Results("update", 1, 60), ["a"], update=1)
    with pytest.raises(FederationError, match=r"100 bytes in a round .*has 60, after 60 of others"):
        site.admit(Results("update", 1, 60), ["a"], update=2)
    site.admit(Results("update", 2, 100), ["a"], update=3)
    with pytest.raises(FederationError, match=r"this update has 101:"):
        site.admit(Results("update", 3, 101), ["a"], update=4)


def test_damaged_rules_do_not_allow_everything(tmp_path: Path) -> None:
    (tmp_path / TRUST_FILE).write_text('{"roots": {}, "requird": true}')
    with pytest.raises(FederationError, match=r"the site's rules are invalid: .*trust\.json: trust\.requird"):
        rules(tmp_path)


def test_an_audit_file_that_cannot_be_written_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    audit = AuditLog(JOB, Context(pool="pool"), str(tmp_path / "file" / "below"))
    audit.sent(Results("update", 1))
    audit.sent(Results("update", 2))
    assert [record.getMessage() for record in caplog.records] == [
        f"the audit file {tmp_path}/file/below/{AUDIT_FILE} cannot be written: "
        + caplog.records[0].getMessage().partition("written: ")[2]
    ]


def test_without_an_audit_log_nothing_is_hashed() -> None:
    audit = AuditLog(JOB, Context(pool="pool"), "")
    assert audit.digest(iter([b"data"])) == ""
    audit.sent(Results("update", 1))
