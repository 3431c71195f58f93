"""The digest of a program, by which a site approves it. Pure functions."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from isthmus_contracts.pb import bridge_pb2 as pb


def program_digest(spec: pb.PoolSpec) -> str:
    """Return the digest of the program of a request; see :func:`digest_of`."""
    return digest_of(spec.command, spec.env, spec.code)


def digest_of(command: Sequence[str], env: Mapping[str, str], code: Mapping[str, bytes]) -> str:
    """Return the SHA-256 of a program in hexadecimal digits.

    It covers the command line, the variables, and the files' names and contents, since each of them can change what
    runs: approved files alone would not exclude ``python -c``. Hashed is a JSON text without blanks and with sorted
    keys: ``{"code": {name: SHA-256 of the content}, "command": [...], "env": {...}}``.
    """
    content = {
        "command": list(command),
        "env": dict(env),
        "code": {name: hashlib.sha256(text).hexdigest() for name, text in code.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
