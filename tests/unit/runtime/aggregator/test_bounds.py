"""Bounds on number, length and characters of everything that clients send."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from isthmus.aggregator.storage import safetensors_file
from isthmus.aggregator.storage.checkpoints import CheckpointError, CheckpointStore
from isthmus.aggregator.updates import bounds
from isthmus.aggregator.updates.validation import Reason, examine_initial
from isthmus.metric_names import problem_with
from isthmus.tensors import specs_of
from isthmus_contracts.pb import federation_pb2 as pb

STATE = {"w": torch.zeros(3), "statistics": torch.zeros(1)}


def header(**changes: object) -> pb.UpdateHeader:
    return pb.UpdateHeader(**{"num_examples": 1, "tensors": specs_of(STATE), "buffers": ["statistics"], **changes})  # type: ignore[arg-type]


def shaped(*shape: int, size: int = 0) -> pb.UpdateHeader:
    return header(tensors=[pb.TensorSpec(name="w", dtype="F32", shape=shape, size=size)], buffers=[])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"metrics": {"\x01" * (20 << 20): 1.0}}, "is not printable"),
        ({"metrics": {"a" * 129: 1.0}}, "has 129 characters, more than 128"),
        ({"metrics": {"": 1.0}}, "is not printable"),
        ({"metrics": {"a\u202etxt": 1.0}}, "is not printable"),
        ({"metrics": {str(i): 1.0 for i in range(257)}}, "257 metrics are too many"),
        ({"scalars": {str(i): 1.0 for i in range(65)}}, "scalars must be at most 64"),
        ({"scalars": {"a\n": 1.0}}, "scalars must be at most 64 printable names"),
        ({"seconds": {"x" * 129: 1.0}}, "seconds must be at most 64"),
        ({"codecs": ["x"] * 17}, "codecs must be at most 16"),
        ({"codecs": ["x" * 129]}, "codecs must be at most 16"),
        ({"instance": "x" * 129}, "instance must be at most 128"),
        ({"base_digest": "\x1b[2J"}, "base_digest must be at most 128"),
        ({"buffers": ["nothing"]}, "the buffer 'nothing' is not one of the tensors"),
        ({"buffers": ["statistics"] * 3}, "3 buffers are more than the 2 tensors"),
        ({"buffers": ["y" * (31 << 20)]}, "is not one of the tensors"),
        ({"frozen": ["nothing"]}, "the frozen tensor 'nothing' is not one of the tensors"),
        ({"frozen": ["statistics"] * 3}, "3 frozen tensors are more than the 2 tensors"),
    ],
)
def test_strings_lists_and_maps_of_an_update(changes: dict[str, object], problem: str) -> None:
    found = bounds.problem_with_header(header(**changes))
    assert found is not None and problem in found
    assert found.isprintable() and len(found) < 300
    fault = examine_initial(header(**changes))
    assert fault is not None and fault.reason == Reason.BOUNDS


def test_updates_of_the_client_library_are_within_bounds() -> None:
    full = header(
        metrics={f"accuracy of class {i}": 1.0 for i in range(256)}, scalars={"steps": 1.0}, seconds={"train": 1.0},
        codecs=["Delta", "TopK=0.01", "Int8", "Zstd"], instance="0" * 32, base_digest="0" * 32,
    )  # fmt: skip
    assert bounds.problem_with_header(full) is None
    assert bounds.problem_with_size(full, sum(spec.ByteSize() + 4 for spec in full.tensors)) is None


def test_fields_that_the_protocol_does_not_know_count() -> None:
    junk = pb.UpdateHeader.FromString(
        header().SerializeToString() + b"\xfa\x7f" + b"\x80\x80\x80\x01" + b"x" * (2 << 20)
    )
    found = bounds.problem_with_size(junk, 100)
    assert found is not None and found.startswith("the header has 2")


@pytest.mark.parametrize(
    ("initial", "reason"),
    [
        (shaped(2**64 - 1, 0), "shape"),
        (shaped(2**63, 0), "shape"),
        (shaped(2**62, 2**62, 0), "shape"),
        (shaped(0, 2**62, 2**62), "shape"),
        (shaped(2**40, 2**24, 0), "shape"),
        (shaped(2**61, 0), "shape"),
        (shaped(*[1] * 65, size=4), "shape"),
        (shaped(*[2**64 - 1] * 5000), "shape"),
        (shaped(3, size=4), "size"),
        (shaped(2**50, size=2**52), "size"),
        (header(tensors=[]), "bounds"),
        (header(tensors=[pb.TensorSpec(name=str(i), dtype="F32") for i in range(100_001)], buffers=[]), "bounds"),
        (header(tensors=[pb.TensorSpec(name="a\nb", dtype="F32", size=4)], buffers=[]), "bounds"),
        (header(tensors=[pb.TensorSpec(name="", dtype="F32", size=4)], buffers=[]), "bounds"),
        (header(tensors=[pb.TensorSpec(name="x" * 513, dtype="F32", size=4)], buffers=[]), "bounds"),
    ],
)
def test_initial_weights_that_no_checkpoint_could_hold(initial: pb.UpdateHeader, reason: str) -> None:
    fault = examine_initial(initial)
    assert fault is not None and fault.reason == reason, fault
    assert fault.message.isprintable() and len(fault.message) <= 300


@pytest.mark.parametrize(
    "view",
    [
        pb.View(name="v", of="w", shape=[1], stride=[2**64 - 1]),
        pb.View(name="v", of="w", shape=[1] * 65, stride=[1] * 65),
        pb.View(name="v", of="w", shape=[2], stride=[2**64 - 1]),
        pb.View(name="v", of="w", offset=2**64 - 1, shape=[1], stride=[1]),
        pb.View(name="v", of="w", shape=[2**64 - 1, 0], stride=[1, 1]),
    ],
)
def test_views_that_could_not_be_written_in_the_end(view: pb.View) -> None:
    """The final model, which includes them, is written only after training."""
    assert examine_initial(header(views=[pb.View(name="v", of="w", shape=[3], stride=[1])])) is None
    fault = examine_initial(header(views=[view]))
    assert fault is not None and fault.message.startswith("v is announced as a view of w")


def test_views_take_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.aggregator.updates.bounds._disk", lambda directory: 1 << 30)
    size = 2**20
    views = [pb.View(name=f"v{i}", of="w", shape=[size], stride=[1]) for i in range(99_999)]
    huge = header(tensors=[pb.TensorSpec(name="w", dtype="F32", shape=[size], size=4 * size)], views=views, buffers=[])
    problem = bounds.problem_with_room(huge, tmp_path)
    assert problem is not None
    assert problem.startswith(f"the model takes {100_000 * 4 * size} bytes, and the aggregator's disk has room for ")


def test_the_longest_accepted_names_can_be_read_back(tmp_path: Path) -> None:
    """The most tensors with the longest names, whose characters take twelve bytes each in JSON."""
    name = "\U0001f600" * 505
    specs = [pb.TensorSpec(name=f"{name}{i:07}", dtype="F32", shape=[1], size=4) for i in range(3300)]
    more = [*specs, *(pb.TensorSpec(name=f"{name}x{i:06}", dtype="F32", shape=[1], size=4) for i in range(200))]
    assert bounds.problem_with_names(pb.UpdateHeader(tensors=more, buffers=[spec.name for spec in more]))
    names = [spec.name for spec in specs]
    assert examine_initial(pb.UpdateHeader(num_examples=1, tensors=specs, buffers=names)) is None
    record = {f"{'€' * 120}{i:08}": 0.1 for i in range(1024)}
    notes = {"buffers": json.dumps(names), "record": json.dumps(record)}
    store = CheckpointStore(tmp_path, "uid", keep=1)
    store.open()
    state = dict.fromkeys(names, torch.zeros(1))
    # The state of a strategy that keeps two tensors for each.
    twice = {f"{group}/{each}": torch.zeros(1) for group in ("first", "second") for each in names}
    store.save(1, state, twice, notes)
    read = store.load(1)
    assert set(read.state) == set(names) and len(read.strategy) == len(twice)


def test_a_header_that_cannot_be_read_back_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "MOST_HEADER_BYTES", 1000)
    store = CheckpointStore(tmp_path, "uid", keep=2)
    store.open()
    store.save(1, STATE)
    with pytest.raises(
        CheckpointError, match=r"it would have a header of 1[0-9]{3} bytes, and safetensors reads at most"
    ):
        store.save(2, STATE, notes={"record": "x" * 1000})
    assert store.numbers() == [1]
    assert not list(tmp_path.rglob("*.partial"))
    assert store.load(1).round == 1


def test_the_librarys_reader_takes_headers_up_to_the_limit(tmp_path: Path) -> None:
    spare = safetensors_file.MOST_HEADER_BYTES - 200
    safetensors_file.write(tmp_path / "f", STATE, {"x": "y" * (spare - 64)})
    with safe_open(tmp_path / "f", framework="pt") as opened:
        assert len(opened.metadata()["x"]) == spare - 64
    with pytest.raises(safetensors_file.HeaderError):
        safetensors_file.write(tmp_path / "g", STATE, {"x": "y" * safetensors_file.MOST_HEADER_BYTES})
    assert not (tmp_path / "g").exists()


def test_names_that_a_script_may_report() -> None:
    assert problem_with(["loss", "accuracy (macro)", "Genauigkeit für Klasse 3"]) is None
    assert problem_with([""]) == "the metric name '' is not printable"
