"""Lines of a client's audit file: what it sent to the aggregator, or refused to send.

The client library appends them to ``audit.jsonl``, and the site's bridge copies them into the site's audit log. The
file belongs to the user's script as much as to the library: a line is a report, not a proof.
"""

import json
import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

LONGEST_LINE = 4096
"""Most bytes of a line, without its end."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must hold no control characters")
    return text


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError("must be finite")
    return number


_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=253)]
_Word = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,63}$")]


class Departure(BaseModel):
    """One message with results of a client."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    time: Annotated[float, AfterValidator(_finite)]
    """By the client's clock, in seconds since the epoch."""
    job: _Name
    """UID of the job."""
    pool: _Name
    index: _Count
    """The client's index within the pool, from 0."""
    round: _Count
    incarnation: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Instance of secure aggregation; 0 without."""
    what: _Word = "update"
    """``update`` or ``evaluation``."""
    size: _Count = 0
    """Bytes of the payload; 0 if nothing was sent."""
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    """Digest of the payload in hexadecimal digits; empty if nothing was sent."""
    protection: _Word = "none"
    """``none`` or ``secure-aggregation``."""
    decision: Literal["sent", "refused"] = "sent"
    reason: Annotated[str, Field(max_length=400), AfterValidator(_printable)] = ""
    """Why it was refused, in one line."""

    def line(self) -> bytes:
        """Return the line for the audit file, with its end."""
        return json.dumps(self.model_dump(), separators=(",", ":")).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Self | None:
        """Read a line; ``None`` if it is malformed or too long."""
        if len(line) > LONGEST_LINE + 1:
            return None
        try:
            values: Any = json.loads(line)
            return cls.model_validate(values)
        except (ValueError, RecursionError, ValidationError):
            return None
