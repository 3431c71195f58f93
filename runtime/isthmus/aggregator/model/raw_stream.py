"""Raw stream of a committed model, shared by the clients that pull it at about the same time."""

from collections import OrderedDict
from collections.abc import Iterator

from isthmus_contracts.pb import federation_pb2 as pb

from ...framing import model_message
from ..storage.safetensors_file import TensorFile

# Bytes of recent messages that are kept. Clients begin a round at the same time and receive its model at about the same
# pace; for one that falls behind, messages are read again. A model up to this size is read once.
SHARED_BYTES = 32 << 20


class RawStream:
    """Messages of a Pull, with the number of data bytes in each, read from the checkpoint's file. Not thread-safe."""

    def __init__(self, header: pb.ModelHeader, file: TensorFile, chunk_bytes: int) -> None:
        self._header = header
        self._file = file
        self._opened = file.path.open("rb", buffering=0)  # the file may be removed before the last client pulls
        self._chunk_bytes = chunk_bytes
        self._recent: OrderedDict[int, tuple[bytes, int]] = OrderedDict()

    def __len__(self) -> int:
        return max(1, -(-self._file.size // self._chunk_bytes))

    def __getitem__(self, number: int) -> tuple[bytes, int]:
        if number in self._recent:
            return self._recent[number]
        if len(self._recent) * self._chunk_bytes >= SHARED_BYTES:
            self._recent.popitem(last=False)
        self._recent[number] = self._read(number)
        return self._recent[number]

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        return (self[number] for number in range(len(self)))

    def _read(self, number: int) -> tuple[bytes, int]:
        self._opened.seek(self._file.data_offset + number * self._chunk_bytes)
        data = self._opened.read(self._chunk_bytes)
        header = self._header if number == 0 else None
        checksum = self._file.checksum if number == len(self) - 1 else ""
        return model_message(header, data, checksum), len(data)
