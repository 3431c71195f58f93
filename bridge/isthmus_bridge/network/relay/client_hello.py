"""Parser of a TLS ClientHello, for the server name (RFC 8446, 4.1.2; RFC 6066, 3). Without side effects."""

_HANDSHAKE = 22
_CLIENT_HELLO = 1
_SERVER_NAME = 0
_HOST_NAME = 0
_RECORD_HEADER = 5
_MESSAGE_HEADER = 4
_LONGEST_RECORD = 1 << 14
LONGEST = 64 << 10
"""Limit of a ClientHello's length in bytes; honest clients stay below it."""
MOST_RECORDS = 64
"""Limit of TLS records in a ClientHello; honest clients send one or two."""


class NotTls(ValueError):
    """The bytes are not a TLS ClientHello."""


class ClientHello:
    """Incremental parser of the first bytes of a TLS client. It looks at each byte once, whatever the chunks."""

    def __init__(self) -> None:
        self.data = bytearray()
        """All bytes received so far."""
        self._record = 0  # start of the first incomplete record
        self._records = 0
        self._handshake = bytearray()

    def feed(self, more: bytes) -> str | None:
        """Parse more bytes. Return the requested server name in lower case (empty if there is none), or ``None`` while
        more bytes are needed.

        Raises:
            NotTls: the bytes are not a TLS ClientHello.
        """
        self.data += more
        while (record := self._next_record()) is not None:
            self._records += 1
            if self._records > MOST_RECORDS:
                raise NotTls("the ClientHello has too many records")
            self._handshake += record
            if self._handshake[0] != _CLIENT_HELLO:
                raise NotTls("not a ClientHello")
            if len(self._handshake) < _MESSAGE_HEADER:
                continue
            wanted = _MESSAGE_HEADER + int.from_bytes(self._handshake[1:_MESSAGE_HEADER])
            if wanted > LONGEST:
                raise NotTls("the ClientHello is too long")
            if len(self._handshake) >= wanted:
                return _server_name(bytes(self._handshake[_MESSAGE_HEADER:wanted]))
        return None

    def _next_record(self) -> bytes | None:
        """Return the content of the next record, or ``None`` if it is incomplete."""
        header = self.data[self._record : self._record + _RECORD_HEADER]
        if (header[:1] and header[0] != _HANDSHAKE) or (header[1:2] and header[1] != 3):
            raise NotTls("not a TLS handshake")
        if len(header) < _RECORD_HEADER:
            return None
        length = int.from_bytes(header[3:5])
        if not 0 < length <= _LONGEST_RECORD:
            raise NotTls("invalid length of a TLS record")
        start = self._record + _RECORD_HEADER
        if len(self.data) < start + length:
            return None
        self._record = start + length
        return bytes(self.data[start : self._record])


def _server_name(message: bytes) -> str:
    try:
        return _host_name(_extensions(message))
    except IndexError:
        raise NotTls("the ClientHello is truncated") from None


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bool__(self) -> bool:
        return bool(self._data)

    def take(self, count: int) -> bytes:
        if count > len(self._data):
            raise IndexError
        taken, self._data = self._data[:count], self._data[count:]
        return taken

    def vector(self, width: int) -> "_Reader":
        """Take a vector that follows its length, which has ``width`` bytes."""
        return _Reader(self.take(int.from_bytes(self.take(width))))

    def rest(self) -> bytes:
        return self._data


def _extensions(message: bytes) -> _Reader:
    reader = _Reader(message)
    reader.take(2 + 32)  # version, random
    reader.vector(1)  # session
    reader.vector(2)  # ciphers
    reader.vector(1)  # compressions
    return reader.vector(2) if reader else reader


def _host_name(extensions: _Reader) -> str:
    while extensions:
        kind, content = int.from_bytes(extensions.take(2)), extensions.vector(2)
        if kind != _SERVER_NAME:
            continue
        names = content.vector(2)
        while names:
            name_kind, name = names.take(1)[0], names.vector(2).rest()
            if name_kind == _HOST_NAME:
                if not name.isascii() or b"\0" in name:
                    raise NotTls("invalid server name")
                return name.decode("ascii").lower()
    return ""
