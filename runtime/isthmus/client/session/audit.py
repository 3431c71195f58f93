"""The client's part of its site's audit log: one line for each message with results that it sends or refuses to send.

The site names the directory (``ISTHMUS_AUDIT_DIR``), and its bridge collects the file. Without a directory nothing is
written. A line is written before the first byte leaves.
"""

import hashlib
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isthmus_contracts import identities
from isthmus_contracts.text import one_line

from ..context import Context

log = logging.getLogger("isthmus")

What = Literal["update", "evaluation", "initial-weights"]
_LONGEST_REASON = 400  # characters


@dataclass(frozen=True)
class Results:
    """A message with results of this client, as the audit log shows it."""

    what: What
    round: int
    size: int = 0
    """Size of the data in bytes."""
    sha256: str = ""
    """Digest of the data as sent, in hexadecimal."""
    incarnation: int = 0
    """The instance of secure aggregation whose masks cover the data; 0: it is sent in clear."""


class AuditLog:
    """Appender to the audit file of a client."""

    def __init__(self, job_uid: str, context: Context, directory: str) -> None:
        """``directory``: of the file; empty: nothing is written."""
        self._path = Path(directory) / identities.AUDIT_FILE if directory else None
        self._job_uid, self._context = job_uid, context
        self._warned = False

    def digest(self, data: Iterable[bytes | memoryview]) -> str:
        """Return the SHA-256 of data in hexadecimal; an empty string without an audit log, to save the time."""
        if self._path is None:
            return ""
        found = hashlib.sha256()
        for piece in data:
            found.update(piece)
        return found.hexdigest()

    def sent(self, results: Results) -> None:
        """Record results that are about to leave."""
        self._append(results, results.size, results.sha256, "sent", "")

    def refused(self, results: Results, reason: str) -> None:
        """Record results that stay here."""
        self._append(results, 0, "", "refused", one_line(reason, _LONGEST_REASON))

    def _append(
        self, results: Results, size: int, sha256: str, decision: Literal["sent", "refused"], reason: str
    ) -> None:  # fmt: skip
        if self._path is None:
            return
        # Its model needs pydantic, whose import most clients can do without.
        from isthmus_contracts.wire.departures import Departure

        try:
            line = Departure(
                time=time.time(),
                job=self._job_uid,
                pool=self._context.pool,
                index=self._context.index,
                round=results.round,
                incarnation=results.incarnation,
                what=results.what,
                size=size,
                sha256=sha256,
                protection="secure-aggregation" if results.incarnation else "none",
                decision=decision,
                reason=reason,
            ).line()
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # One write to the end of the file: clients of a pool may share it.
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            if not self._warned:
                self._warned = True
                log.warning("the audit file %s cannot be written: %s", self._path, one_line(str(error)))
