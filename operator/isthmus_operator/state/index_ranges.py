"""Sets of non-negative integers as text with ranges: ``0-4,7``."""

import re
from collections.abc import Iterable, Iterator

_PART = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def write(numbers: Iterable[int]) -> str:
    """Format non-negative numbers."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def read(text: str) -> Iterator[int]:
    """Yield the numbers of a text one by one, since there may be many. Raises ``ValueError`` for malformed text."""
    for part in text.split(","):
        found = _PART.fullmatch(part)
        if found is None:
            raise ValueError(f"{part!r} is not a number or a range of numbers")
        first = int(found[1])
        yield from range(first, int(found[2] or first) + 1)
