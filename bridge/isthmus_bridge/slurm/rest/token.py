"""Where slurmrestd's tokens (JWT) come from: a file that somebody renews, or a command such as ``scontrol token``."""

import base64
import binascii
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..model import SlurmError

# `scontrol token` writes the assignment, other programs the bare token.
_TOKEN = re.compile(r"(?:SLURM_JWT=)?([A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*)")
_MAX_TOKEN = 16_384
# Renewed when less is left: a minute, but never most of a short life.
_MARGIN = 60.0
_MARGIN_SHARE = 5
# A token that the server does not like is renewed this often at most: its dislike may have another reason.
_PATIENCE = 30.0


class TokenFile:
    """Read at every use: whoever renews it need not tell."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock

    def get(self) -> str:
        """A token that is valid now. Raises :class:`SlurmError`."""
        try:
            with self._path.open("rb") as file:
                text = file.read(_MAX_TOKEN)
        except OSError as error:
            raise SlurmError(f"token: cannot read {self._path}: {error.strerror}") from None
        token = _read(text.decode("utf-8", "replace"), str(self._path))
        ends = expiry(token)
        if ends is not None and ends <= self._clock():
            raise SlurmError(f"token: the one in {self._path} has expired; renew the file")
        return token

    def invalidate(self, token: str) -> bool:
        """The server may not accept this one. Whether :meth:`get` may now tell another."""
        try:
            return self.get() != token
        except SlurmError:
            return False


class TokenCommand:
    """Run when a token is needed: at first, and before the last one ends."""

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
        """A token that is valid now. Raises :class:`SlurmError`."""
        with self._lock:
            if not self._token or (self._until is not None and self._clock() >= self._until):
                self._renew()
            return self._token

    def invalidate(self, token: str) -> bool:
        """The server may not accept this one. Whether :meth:`get` will now tell another."""
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
            raise SlurmError(f"token: {self._argv[0]} gave one that has expired")
        self._token, self._made = token, now
        self._until = None if ends is None else ends - min(_MARGIN, (ends - now) / _MARGIN_SHARE)


def expiry(token: str) -> float | None:
    """When the token says that it ends; None: it does not say."""
    claims = token.split(".")[1]
    try:
        content = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
        return float(content["exp"])
    except (binascii.Error, ValueError, KeyError, TypeError):
        return None


def _read(text: str, source: str) -> str:
    # Never the text itself in a message: it may be a secret.
    match = _TOKEN.fullmatch(text.strip())
    if match is None:
        raise SlurmError(f"token: {source} holds no token (JWT, with or without SLURM_JWT= before it)")
    return match[1]
