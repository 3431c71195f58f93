"""Reader of IDX files, the format of the MNIST family (Y. LeCun, http://yann.lecun.com/exdb/mnist/)."""

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"


class IdxError(ValueError):
    """A file is missing or is not an IDX file of bytes; ``str()`` is one line that names it."""


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read a file of bytes, plain or gzipped: ``path`` itself or with .gz appended. Raises :class:`IdxError`.

    The format: two zero bytes, the type, the number of dimensions; each dimension as four bytes, big-endian; the data,
    last dimension fastest.
    """
    packed = path.with_name(path.name + ".gz")
    try:
        content = (packed if packed.exists() else path).read_bytes()
    except OSError as error:
        raise IdxError(f"{path}[.gz]: {error.strerror}") from None
    if content.startswith(_GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise IdxError(f"{path}.gz: {error}") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise IdxError(f"{path}: not an IDX file of bytes")
    dimensions, start = content[3], 4 + 4 * content[3]
    if len(content) < start:
        raise IdxError(f"{path}: ends within its header")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise IdxError(f"{path}: holds {len(content) - start} bytes of data where its header says {math.prod(shape)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
