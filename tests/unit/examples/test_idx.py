"""Reading of IDX files, and of Fashion-MNIST from them."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from isthmus_examples import fashion_mnist
from isthmus_examples.idx import IdxError, read_idx


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


PICTURES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def test_reads_plain_and_gzipped_files_alike(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(idx(PICTURES))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(idx(PICTURES), mtime=0))
    (tmp_path / "packed-without-suffix").write_bytes(gzip.compress(idx(PICTURES), mtime=0))
    for name in ("plain", "packed", "packed-without-suffix"):
        assert np.array_equal(read_idx(tmp_path / name), PICTURES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG\r\n", "not an IDX file"),
        (b"\0\0\x0d\x01" + struct.pack(">I", 0), "not an IDX file of bytes"),  # floats
        (b"\0\0\x08\x03\0\0", "ends within its header"),
        (idx(PICTURES)[:-1], "holds 23 bytes of data where its header says 24"),
        (idx(PICTURES) + b"\0", "holds 25 bytes"),
        (gzip.compress(idx(PICTURES), mtime=0)[:-9], "ended before|end-of-stream"),
    ],
)
def test_refuses_what_is_no_whole_idx_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(IdxError, match=message) as caught:
        read_idx(tmp_path / "file")
    assert "file" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_data_ends_the_script_with_one_line_that_helps(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        fashion_mnist.load(tmp_path)
    message = str(caught.value)
    assert "train-images-idx3-ubyte" in message
    assert "dataset-fashion-mnist" in message
    assert "\n" not in message


def test_fashion_mnist_comes_as_pictures_with_one_channel(tmp_path: Path) -> None:
    for part, count in (("train", 5), ("t10k", 3)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(np.full((count, 28, 28), 255, np.uint8)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8)))
    train, held_out = fashion_mnist.load(tmp_path)
    assert train.inputs.shape == (5, 1, 28, 28) and float(train.inputs.max()) == 1.0
    assert held_out.labels.tolist() == [0, 1, 2]
    assert fashion_mnist.build()(train.inputs).shape == (5, 10)
