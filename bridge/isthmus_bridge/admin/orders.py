"""Orders of the site's admin to the running bridge, as files beside the journal, which the bridge has locked.

An order is a file with one JSON object. The bridge executes it, and writes the answer to another file.
"""

import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from ..files import untrusted_files

_LONGEST = 1 << 16


class OrderError(Exception):
    """The order could not be given, or was not executed. ``str()`` is one line."""


def folder_of(journal: Path) -> Path:
    """Return the folder of the orders."""
    return journal.with_name("orders")


def end_all(journal: Path, caller: str, reason: str, patience: float) -> list[str]:
    """Order the bridge to end a caller's pools, and return their keys. Raises :class:`OrderError`.

    ``patience``: seconds to wait for the bridge.
    """
    folder = folder_of(journal)
    order = folder / f"{secrets.token_hex(8)}.order"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        untrusted_files.write(order, json.dumps({"end": caller, "reason": reason}).encode())
    except OSError as error:
        raise OrderError(
            f"{error.filename or folder}: {error.strerror}; run this as the user who runs the bridge"
        ) from None
    answer, deadline = order.with_suffix(".answer"), time.monotonic() + patience
    while not answer.exists():
        if time.monotonic() > deadline:
            if _withdrawn(order):
                raise OrderError("the bridge is not running, or hangs; nothing was ended")
            break  # the bridge is executing it
        time.sleep(0.1)
    return _answer(answer)


def _withdrawn(order: Path) -> bool:
    try:
        order.unlink()
    except FileNotFoundError:
        return False
    return True


def _answer(path: Path) -> list[str]:
    try:
        content = json.loads(untrusted_files.read(path))
        path.unlink()
        return [str(key) for key in content["ended"]]
    except (OSError, ValueError, LookupError, TypeError):
        raise OrderError(f"{path}: malformed answer; `isthmus-bridge status` shows the pools") from None


def execute(journal: Path, end: Callable[[str, str], list[str]]) -> None:
    """Execute the pending orders. ``end``: ends a caller's pools, given a reason. Raises ``OSError``."""
    try:
        orders = sorted(folder_of(journal).iterdir())
    except FileNotFoundError:
        return
    for order in orders:
        if order.suffix != ".order":
            continue
        content = untrusted_files.read(order)
        # Remove it before executing it, so that it can no longer be withdrawn.
        order.unlink()
        try:
            asked = json.loads(content[:_LONGEST])
            answer = {"ended": end(str(asked["end"]), str(asked["reason"]))}
        except (ValueError, LookupError, TypeError):
            answer = {}
        untrusted_files.write(order.with_suffix(".answer"), json.dumps(answer).encode())
