"""The directory of a pool that belongs to another local user: a :class:`~..files.run_directory.RunDirectory` by proxy.

The bridge's own ``run_dir`` has a folder with the same key. It records the time until which a submission may be under
way, and the user's name in ``credentials-of`` while that user's directory may hold the pool's credentials.
"""

import base64
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ..files import untrusted_files
from ..files.run_directory import TAIL_BYTES, TAIL_LINES, Exit, RunDirectory, TaskMarker, claim, exit_code
from ..slurm.run_as import AsUserError
from .helper_client import AsUser, encoded

_OWNER = "credentials-of"
T = TypeVar("T")


class UserDirectory:
    """Files of one pool, owned by the given user and accessed through the helper."""

    def __init__(self, root: Path, own_root: Path, key: str, user: str, as_user: AsUser) -> None:
        """``root``: the directory of the user's pools; ``own_root``: that of the bridge's pools."""
        there = RunDirectory(root, key)
        self.path, self.script, self.client_script, self.tls = there.path, there.script, there.client_script, there.tls
        self.log_pattern, self.job_log_pattern = there.log_pattern, there.job_log_pattern
        self.guard = own_root / key
        self._key = key
        self._user = user
        self._as_user = as_user

    def _ask(self, do: str, **fields: Any) -> Any:
        return self._as_user.ask(self._user, do, self._key, **fields)

    def create(self, credentials: Mapping[str, bytes]) -> bool:
        """See :meth:`~..files.run_directory.RunDirectory.create`."""
        claim(self.guard)
        self._note_credentials()
        return self._ask("create", files=encoded(credentials)) is True

    def write_credentials(self, credentials: Mapping[str, bytes]) -> None:
        """See :meth:`~..files.run_directory.RunDirectory.write_credentials`."""
        self._note_credentials()
        self._ask("credentials", files=encoded(credentials))

    def _note_credentials(self) -> None:
        untrusted_files.write(self.guard / _OWNER, self._user.encode("ascii"))

    def write_code(self, files: Mapping[str, bytes]) -> None:
        """See :meth:`~..files.run_directory.RunDirectory.write_code`."""
        if files:
            self._ask("code", files=encoded(files))

    def write_scripts(self, batch: str, client: str = "") -> None:
        """See :meth:`~..files.run_directory.RunDirectory.write_scripts`."""
        self._ask("scripts", batch=batch, client=client)

    def holds_credentials(self) -> bool:
        """Return whether the pool's credentials may still be in the user's directory."""
        return (self.guard / _OWNER).exists()

    def submitted(self) -> bool:
        """Return whether a script was ever written. Raises ``OSError``."""
        return self._ask("known") is True

    def forget_credentials(self) -> None:
        """See :meth:`~..files.run_directory.RunDirectory.forget_credentials`."""
        self._ask("forget")
        (self.guard / _OWNER).unlink(missing_ok=True)

    def remove(self) -> None:
        """See :meth:`~..files.run_directory.RunDirectory.remove`."""
        self._ask("remove")
        with suppress(FileNotFoundError):
            shutil.rmtree(self.guard)

    def task_markers(self) -> dict[int, TaskMarker]:
        """See :meth:`~..files.run_directory.RunDirectory.task_markers`."""
        return _read(_mark, self._ask("marks"))

    def exits(self, wanted: Collection[int]) -> dict[int, Exit]:
        """See :meth:`~..files.run_directory.RunDirectory.exits`."""
        return _read(_exit, self._ask("exits", wanted=sorted(wanted)))

    def tails(
        self, indices: Iterable[int], lines: int = TAIL_LINES, limit: int = TAIL_BYTES, *, of_jobs: bool = False
    ) -> dict[int, str]:
        """See :meth:`~..files.run_directory.RunDirectory.tails`."""
        wanted = list(indices)
        answer = self._ask("tails", indices=wanted, lines=lines, limit=limit, of_jobs=of_jobs) if wanted else {}
        return {index: str(answer.get(str(index), "")) for index in wanted}

    def departures(
        self, offsets: Mapping[int, int], full: Collection[int], piece: int, most: int
    ) -> dict[int, tuple[int, bytes]]:
        """See :meth:`~..files.run_directory.RunDirectory.departures`."""
        begin = {str(index): offset for index, offset in offsets.items()}
        found = _read(_piece, self._ask("departures", offsets=begin, full=sorted(full), piece=piece, most=most))
        # The answer may be forged.
        return {i: (start, data[:piece]) for i, (start, data) in found.items() if 0 <= i < 10**7 and i not in full}

    def log_tail(self, index: int, lines: int, limit: int) -> str:
        """See :meth:`~..files.run_directory.RunDirectory.log_tail`."""
        return str(self._ask("log", index=index, lines=lines, limit=limit))


def _mark(answer: Any) -> TaskMarker:
    code = answer["exit_code"]
    return TaskMarker(int(answer["array_id"]), str(answer["node"]), None if code is None else _code(code))


def _exit(answer: Any) -> Exit:
    return Exit(int(answer["array_id"]), int(answer["restarts"]), _code(answer["code"]))


def _piece(answer: Any) -> tuple[int, bytes]:
    start, data = answer
    return max(0, int(start)), base64.b64decode(data, validate=True)


def _code(answer: Any) -> int:
    if (code := exit_code(str(answer))) is None:
        raise ValueError(answer)
    return code


def _read(one: Callable[[Any], T], answer: Any) -> dict[int, T]:
    """Validate an answer, which the user's processes may have forged. Raises :class:`AsUserError` if it is
    malformed."""
    try:
        return {int(index): one(fields) for index, fields in answer.items()}
    except (AttributeError, LookupError, TypeError, ValueError):
        raise AsUserError("the helper's answer is malformed", begun=True) from None


def owner(guard: Path) -> str:
    """Return the user whose directory may hold the credentials of the pool of this folder; empty if there is none."""
    try:
        text = untrusted_files.read(guard / _OWNER).decode("ascii")
    except (OSError, UnicodeDecodeError):
        return ""
    return text if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", text) else ""
