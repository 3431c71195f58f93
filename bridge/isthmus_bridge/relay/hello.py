"""Finds the server's name in the first bytes that a TLS client sends (RFC 8446, 4.1.2; RFC 6066, 3). Pure."""

_HANDSHAKE = 22
_CLIENT_HELLO = 1
_SERVER_NAME = 0
_HOST_NAME = 0
_RECORD_HEADER = 5
_LONGEST_RECORD = 1 << 14
LONGEST = 64 << 10
"""More than any honest client sends before it is answered."""


class NotTls(ValueError):
    """Nothing that a TLS client sends first."""


def server_name(data: bytes) -> str | None:
    """The name that the client asks for, in lower case; empty: it names none; None: more bytes are needed.

    Raises :class:`NotTls`.
    """
    message = _message(data)
    if message is None:
        return None
    try:
        return _host_name(_extensions(message))
    except IndexError:
        raise NotTls("a ClientHello that ends too early") from None


def _message(data: bytes) -> bytes | None:
    """The ClientHello, put together from its records."""
    handshake = b""
    while True:
        if (data[:1] and data[0] != _HANDSHAKE) or (data[1:2] and data[1] != 3):
            raise NotTls("not a TLS handshake")
        if len(data) < _RECORD_HEADER:
            break
        length = int.from_bytes(data[3:5])
        if not 0 < length <= _LONGEST_RECORD:
            raise NotTls("a TLS record of no valid length")
        handshake += data[_RECORD_HEADER : _RECORD_HEADER + length]
        if handshake and handshake[0] != _CLIENT_HELLO:
            raise NotTls("not a ClientHello")
        if len(handshake) >= 4:
            wanted = 4 + int.from_bytes(handshake[1:4])
            if wanted > LONGEST:
                raise NotTls("a ClientHello that is too long")
            if len(handshake) >= wanted:
                return handshake[4:wanted]
        if len(data) < _RECORD_HEADER + length:
            break
        data = data[_RECORD_HEADER + length :]
    return None


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
        """What follows its own length, written in ``width`` bytes."""
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
                    raise NotTls("a server's name that is none")
                return name.decode("ascii").lower()
    return ""
