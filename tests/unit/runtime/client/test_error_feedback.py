"""The residual survives a restart of its process if there is a scratch directory."""

import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from isthmus.client.context import Context
from isthmus.client.session.compression import ClientCompression
from isthmus.client.session.error_feedback import ErrorFeedback
from isthmus.codecs import Encoded, Residual
from isthmus_contracts import identities
from isthmus_contracts.pb import federation_pb2 as pb

RESIDUAL = Residual()
RESIDUAL.begin("w", (5,))
RESIDUAL.write("w", 0, torch.arange(5.0))


PLACE = Context(pool="pool", index=3)
FILE = "residual-pool-3.safetensors"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scratch directory, which does not exist yet."""
    monkeypatch.setenv(identities.ENV_SCRATCH, str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def test_it_survives_a_restart(scratch: Path) -> None:
    ErrorFeedback("uid", PLACE).advance(RESIDUAL, 7)
    found = ErrorFeedback("uid", PLACE).residual
    assert found is not None
    values = found.read("w", (5,), 0, 5)
    assert values is not None
    torch.testing.assert_close(values, torch.arange(5.0), rtol=0, atol=4 / 65534)
    assert [path.name for path in scratch.iterdir()] == [FILE]


def test_another_jobs_is_not_taken(scratch: Path) -> None:
    ErrorFeedback("uid", PLACE).advance(RESIDUAL, 7)
    assert ErrorFeedback("other", PLACE).residual is None
    assert ErrorFeedback("uid", Context(pool="pool", index=4)).residual is None


def test_a_damaged_file_is_ignored(scratch: Path) -> None:
    scratch.mkdir()
    (scratch / FILE).write_bytes(b"garbage")
    feedback = ErrorFeedback("uid", PLACE)
    assert feedback.residual is None
    feedback.advance(RESIDUAL, 1)
    assert ErrorFeedback("uid", PLACE).residual is not None


def test_a_file_with_other_content_is_ignored(scratch: Path, caplog: pytest.LogCaptureFixture) -> None:
    scratch.mkdir()
    save_file({"w": torch.arange(5.0)}, scratch / FILE, {"job_uid": "uid"})
    assert ErrorFeedback("uid", PLACE).residual is None
    assert "w is not part of a residual" in caplog.text


def test_a_directory_that_cannot_be_written_costs_only_the_file(scratch: Path) -> None:
    scratch.write_text("")
    feedback = ErrorFeedback("uid", PLACE)
    feedback.advance(RESIDUAL, 1)
    assert feedback.residual is RESIDUAL


def test_a_full_disk_costs_only_the_file(scratch: Path) -> None:
    """A failed write keeps the previous file and leaves no partial one."""
    feedback = ErrorFeedback("uid", PLACE)
    feedback.advance(RESIDUAL, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = Residual()
    large.begin("w", (100_000,))
    large.write("w", 0, torch.ones(100_000))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        feedback.advance(large, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert feedback.residual is large
    assert [path.name for path in scratch.iterdir()] == [FILE]
    found = ErrorFeedback("uid", PLACE).residual
    assert found is not None and found.read("w", (5,), 0, 5) is not None


class FakeSession:
    """The attributes of a session that compression uses."""

    job_uid = "uid"
    context = Context(pool="pool", index=0)


@pytest.fixture
def compression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClientCompression:
    monkeypatch.setenv(identities.ENV_SCRATCH, str(tmp_path))
    return ClientCompression(FakeSession())  # type: ignore[arg-type]


def one_round(compression: ClientCompression, number: int) -> Encoded:
    offer = pb.Offer(round=number, base_round=number - 1, base_digest=f"d{number}", codecs=["Delta", "TopK=0.1"])
    live = {"w": torch.zeros(1000)}
    compression.on_pulled(offer, {"w": torch.zeros(1000)}, lambda: live)
    live["w"] += torch.arange(1000.0)
    encoded = compression.encode_update(offer, live, (), ())
    assert isinstance(encoded, Encoded)
    return encoded


def test_only_accepted_updates_advance_it(compression: ClientCompression, tmp_path: Path) -> None:
    first = one_round(compression, 1)
    # Refused, or never answered: the next update is the same as without this one.
    assert one_round(compression, 1).chunks == first.chunks
    assert list(tmp_path.iterdir()) == []
    compression.on_accepted(first, 1)
    second = one_round(compression, 2)
    assert second.chunks != first.chunks
    # The aggregator restarted and accepted the same update again: nothing is added twice.
    compression.on_accepted(first, 1)
    assert one_round(compression, 2).chunks == second.chunks
    # A restarted client continues with the same residual.
    assert one_round(ClientCompression(FakeSession()), 2).chunks == second.chunks  # type: ignore[arg-type]


def test_a_masked_update_advances_it_once_it_is_committed(compression: ClientCompression) -> None:
    assert compression.masked_residual(keep=0.25) is None
    compression.on_masked_committed(None, 1)
    compression.on_masked_committed(RESIDUAL, 2)
    assert compression.masked_residual(keep=0.25) is RESIDUAL
    assert compression.masked_residual(keep=0.0) is None  # all coordinates travel
    restarted = ClientCompression(FakeSession())  # type: ignore[arg-type]
    assert restarted.masked_residual(keep=0.25) is not None


def test_a_model_that_adopts_what_it_loads_does_not_change_the_base(compression: ClientCompression) -> None:
    offer = pb.Offer(round=1, base_digest="d", codecs=["Delta", "Int8"])
    adopted = {"w": torch.zeros(1000)}
    compression.on_pulled(offer, adopted, lambda: adopted)
    adopted["w"] += 1.0
    encoded = compression.encode_update(offer, adopted, (), ())
    assert isinstance(encoded, Encoded)
    assert any(encoded.chunks[0][16:])


def test_a_base_is_named_only_while_it_is_held(compression: ClientCompression) -> None:
    offer = pb.Offer(round=1, base_digest="d", model_codecs=["Delta", "Int8"])
    compression.on_pulled(offer, {"w": torch.zeros(1000)}, dict)
    assert compression.request(pb.Offer(base_digest="e")).base_digest == "d"
    compression.request_uncompressed()
    request = compression.request(pb.Offer(base_digest="e"))
    assert (request.base_digest, list(request.codecs)) == ("", [])


def test_a_second_run_of_a_job_rounds_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's uid has no influence: strategy.deterministic also holds with stochastic codecs."""

    def run(uid: str, index: int) -> list[bytes]:
        session = FakeSession()
        session.job_uid, session.context = uid, Context(pool="pool", index=index)
        compression = ClientCompression(session)  # type: ignore[arg-type]
        offer = pb.Offer(round=1, base_digest="d", codecs=["Delta", "Rotation", "Int8"])
        live = {"w": torch.arange(1000.0)}
        compression.on_pulled(offer, {"w": torch.zeros(1000)}, lambda: live)
        encoded = compression.encode_update(offer, live, (), ())
        assert isinstance(encoded, Encoded)
        return encoded.chunks

    monkeypatch.delenv(identities.ENV_SCRATCH, raising=False)
    assert run("first", 0) == run("second", 0)
    assert run("first", 0) != run("first", 1)
