"""Sources of slurmrestd's tokens (JWT): a file that is renewed by other means, or a command like ``scontrol token``."""

import base64
import binascii
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..model import SlurmError

# `scontrol token` prints an assignment, other programs the bare token.
_TOKEN = re.compile(r"(?:SLURM_JWT=)?([A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*)")
_MAX_TOKEN = 16_384
# A token is renewed this long before it expires (seconds), or after 4/5 of a short lifetime.
_MARGIN = 60.0
_MARGIN_SHARE = 5
# A token that the server rejects is renewed at most this often, since the rejection may have another reason. Seconds.
_PATIENCE = 30.0


class TokenFile:
    """A token in a file, which is read at every use."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock

    def get(self) -> str:
        """Return a valid token. Raises :class:`SlurmError`."""
        try:
            with self._path.open("rb") as file:
                text = file.read(_MAX_TOKEN)
        except OSError as error:
            raise SlurmError(f"token: cannot read {self._path}: {error.strerror}") from None
        token = _read(text.decode("utf-8", "replace"), str(self._path))
        ends = expiry(token)
        if ends is not None and ends <= self._clock():
            raise SlurmError(f"token: the token in {self._path} has expired; renew the file")
        return token

    def invalidate(self, token: str) -> bool:
        """Note that the server may have rejected a token. Return whether :meth:`get` may now return another."""
        try:
            return self.get() != token
        except SlurmError:
            return False


class TokenCommand:
    """A command that prints a token. It runs at first use, and before the last token expires."""

    def __init__(
        self, argv: Sequence[str], run: Callable[[Sequence[str]], str], clock: Callable[[], float] = time.time
    ) -> None:
        self._argv = argv
        self._run = run
        self._clock = clock
        self._lock = threading.Lock()
        self._token = ""
        self._until: float | None = None
        self._made = 0.0

    def get(self) -> str:
        """Return a valid token. Raises :class:`SlurmError`."""
        with self._lock:
            if not self._token or (self._until is not None and self._clock() >= self._until):
                self._renew()
            return self._token

    def invalidate(self, token: str) -> bool:
        """Note that the server may have rejected a token. Return whether :meth:`get` will return another."""
        with self._lock:
            if token == self._token:
                if self._clock() < self._made + _PATIENCE:
                    return False
                self._token = ""
            return True

    def _renew(self) -> None:
        token = _read(self._run(self._argv), self._argv[0])
        now = self._clock()
        ends = expiry(token)
        if ends is not None and ends <= now:
            raise SlurmError(f"token: {self._argv[0]} printed an expired token")
        self._token, self._made = token, now
        self._until = None if ends is None else ends - min(_MARGIN, (ends - now) / _MARGIN_SHARE)


def expiry(token: str) -> float | None:
    """Return the expiry in the token, in seconds since the epoch; ``None`` if it has none."""
    claims = token.split(".")[1]
    try:
        content = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
        return float(content["exp"])
    except (binascii.Error, ValueError, KeyError, TypeError):
        return None


def _read(text: str, source: str) -> str:
    # Do not quote the text in a message: it may be a secret.
    match = _TOKEN.fullmatch(text.strip())
    if match is None:
        raise SlurmError(f"token: {source} holds no token (JWT, with or without SLURM_JWT= before it)")
    return match[1]
