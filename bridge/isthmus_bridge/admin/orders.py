"""Orders of the site's admin to the bridge that runs: the journal is the bridge's alone, so they are written beside it.

An order is a file of one JSON object; the bridge obeys, and puts the answer in its place.
"""

import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from ..files import untrusted_files

_LONGEST = 1 << 16


class OrderError(Exception):
    """The order could not be given, or was not obeyed. ``str()`` is one line."""


def folder_of(journal: Path) -> Path:
    """Return where orders lie."""
    return journal.with_name("orders")


def end_all(journal: Path, caller: str, reason: str, patience: float) -> list[str]:
    """Has the bridge end a caller's pools, and returns their keys. Raises :class:`OrderError`."""
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
                raise OrderError("the bridge does not run, or hangs; nothing was ended")
            break  # it is being obeyed at this moment
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
        raise OrderError(f"{path}: no answer that is understood; `isthmus-bridge status` shows the pools") from None


def execute(journal: Path, end: Callable[[str, str], list[str]]) -> None:
    """Does what the orders that lie there ask for. ``end``: of a caller's pools, with a reason. Raises ``OSError``."""
    try:
        orders = sorted(folder_of(journal).iterdir())
    except FileNotFoundError:
        return
    for order in orders:
        if order.suffix != ".order":
            continue
        content = untrusted_files.read(order)
        # Taken before it is obeyed: nobody withdraws it any more.
        order.unlink()
        try:
            asked = json.loads(content[:_LONGEST])
            answer = {"ended": end(str(asked["end"]), str(asked["reason"]))}
        except (ValueError, LookupError, TypeError):
            answer = {}
        untrusted_files.write(order.with_suffix(".answer"), json.dumps(answer).encode())
