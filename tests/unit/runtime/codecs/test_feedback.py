"""The residual outlives its process where there is a scratch directory, and nothing else does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from isthmus.client.compression import Compression
from isthmus.client.context import Context
from isthmus.codecs import Encoded, ErrorFeedback, Residual
from isthmus_contracts import identities
from isthmus_contracts.pb import federation_pb2 as pb

RESIDUAL = Residual()
RESIDUAL.begin("w", (5,))
RESIDUAL.write("w", 0, torch.arange(5.0))


def test_it_survives_a_restart(tmp_path: Path) -> None:
    scratch = tmp_path / "not" / "yet"
    ErrorFeedback(scratch, "uid", "pool", 3).advance(RESIDUAL, 7)
    found = ErrorFeedback(scratch, "uid", "pool", 3).residual
    assert found is not None
    values = found.read("w", (5,), 0, 5)
    assert values is not None
    torch.testing.assert_close(values, torch.arange(5.0), rtol=0, atol=4 / 65534)
    assert [path.name for path in scratch.iterdir()] == ["residual-pool-3.safetensors"]


def test_another_jobs_is_not_taken(tmp_path: Path) -> None:
    ErrorFeedback(tmp_path, "uid", "pool", 3).advance(RESIDUAL, 7)
    assert ErrorFeedback(tmp_path, "other", "pool", 3).residual is None
    assert ErrorFeedback(tmp_path, "uid", "pool", 4).residual is None


def test_a_damaged_file_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "residual-pool-3.safetensors").write_bytes(b"garbage")
    feedback = ErrorFeedback(tmp_path, "uid", "pool", 3)
    assert feedback.residual is None
    feedback.advance(RESIDUAL, 1)
    assert ErrorFeedback(tmp_path, "uid", "pool", 3).residual is not None


def test_a_file_with_something_else_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"w": torch.arange(5.0)}, tmp_path / "residual-pool-3.safetensors", {"job_uid": "uid"})
    assert ErrorFeedback(tmp_path, "uid", "pool", 3).residual is None
    assert "w is no part of a residual" in caplog.text


def test_a_directory_that_cannot_be_written_costs_only_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    feedback = ErrorFeedback(tmp_path / "file", "uid", "pool", 3)
    feedback.advance(RESIDUAL, 1)
    assert feedback.residual is RESIDUAL


class FakeSession:
    """As much of a session as compression needs."""

    job_uid = "uid"
    context = Context(pool="pool", index=0)


@pytest.fixture
def compression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compression:
    monkeypatch.setenv(identities.ENV_SCRATCH, str(tmp_path))
    return Compression(FakeSession())  # type: ignore[arg-type]


def one_round(compression: Compression, number: int) -> Encoded:
    offer = pb.Offer(round=number, base_round=number - 1, base_digest=f"d{number}", codecs=["Delta", "TopK=0.1"])
    live = {"w": torch.zeros(1000)}
    compression.pulled(offer, {"w": torch.zeros(1000)}, lambda: live)
    live["w"] += torch.arange(1000.0)
    encoded = compression.finished(offer, live)
    assert isinstance(encoded, Encoded)
    return encoded


def test_only_accepted_updates_advance_it(compression: Compression, tmp_path: Path) -> None:
    first = one_round(compression, 1)
    # Refused, or never answered: the next update is as if this one had not been.
    assert one_round(compression, 1).chunks == first.chunks
    assert list(tmp_path.iterdir()) == []
    compression.accepted(first, 1)
    second = one_round(compression, 2)
    assert second.chunks != first.chunks
    # The aggregator restarted and took the same update again: nothing is added twice.
    compression.accepted(first, 1)
    assert one_round(compression, 2).chunks == second.chunks
    # A restart of the client goes on from the same residual.
    assert one_round(Compression(FakeSession()), 2).chunks == second.chunks  # type: ignore[arg-type]


def test_a_model_that_adopts_what_it_loads_does_not_change_the_base(compression: Compression) -> None:
    offer = pb.Offer(round=1, base_digest="d", codecs=["Delta", "Int8"])
    adopted = {"w": torch.zeros(1000)}
    compression.pulled(offer, adopted, lambda: adopted)
    adopted["w"] += 1.0
    encoded = compression.finished(offer, adopted)
    assert isinstance(encoded, Encoded)
    assert any(encoded.chunks[0][16:])


def test_a_base_is_named_only_while_it_is_held(compression: Compression) -> None:
    offer = pb.Offer(round=1, base_digest="d", model_codecs=["Delta", "Int8"])
    compression.pulled(offer, {"w": torch.zeros(1000)}, dict)
    assert compression.request(pb.Offer(base_digest="e")).base_digest == "d"
    compression.distrust()
    request = compression.request(pb.Offer(base_digest="e"))
    assert (request.base_digest, list(request.codecs)) == ("", [])
