"""Journal of an instance whose survivors are fixed: with it, a restarted aggregator opens the same sum."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from isthmus_contracts.process import files

from ..clients.membership import ClientId


@dataclass(frozen=True)
class Entry:
    """State of a round of secure aggregation that survives the end of the process."""

    job_uid: str
    round: int
    base_digest: str
    """Digest of the base model's checkpoint."""
    purpose: int
    """Purpose of its instances, as SecureBegin numbers it."""
    attempt: int = 0
    """Number of instances of the round that failed after their survivors were announced. Clients never contribute the
    updates of these to another sum: they train again."""
    checksum: str = ""
    """xxh3-128 of the accumulator when the survivors were fixed; empty if there is no instance to go on with."""
    participants: tuple[ClientId, ...] = ()
    """Clients of the newest instance."""
    contributors: tuple[ClientId, ...] = ()
    """Clients whose updates are in the accumulator."""
    protocol: bytes = b""
    """State of the protocol, as ServerProtocol.journal returns it."""
    reason: str = ""
    """Why the newest of the failed instances (:attr:`attempt`) failed, in one line."""

    def is_of(self, job_uid: str, round_number: int, base_digest: str, purpose: int) -> bool:
        """Return whether the entry belongs to that round."""
        own = (self.job_uid, self.round, self.base_digest, self.purpose)
        return own == (job_uid, round_number, base_digest, purpose)


class JournalFile:
    """File with at most one entry."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, entry: Entry, *, sync: bool) -> None:
        """Replace the entry. With ``sync`` it survives a power failure. Raise ``OSError``."""
        fields = {**asdict(entry), "protocol": entry.protocol.hex()}
        files.replace(self._path, json.dumps(fields).encode(), 0o600, sync=sync)

    def read(self) -> Entry | None:
        """Return the entry; ``None`` if there is none, or none that can be read. Raise ``OSError``."""
        try:
            fields = json.loads(self._path.read_text(encoding="utf-8"))
            fields["protocol"] = bytes.fromhex(fields["protocol"])
            for name in ("participants", "contributors"):
                fields[name] = tuple((str(pool), int(index)) for pool, index in fields[name])
            return Entry(**fields)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None  # written by another version

    def remove(self) -> None:
        """Remove the entry, if there is one. Raise ``OSError``."""
        self._path.unlink(missing_ok=True)
