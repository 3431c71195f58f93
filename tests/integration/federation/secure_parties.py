"""Parties of secure aggregation for tests, with their roots and the files of their clients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isthmus_contracts.wire.parties import Trust, issue, new_root, write_party_files

from .conftest import POOL, UID, Federation
from .subprocess_job import Forked

SECURE = {"secureAggregation": {"metrics": {"score": "10"}}}


class Parties:
    """Parties with distinct roots, all of which trust each other."""

    def __init__(self, names: Sequence[str] = ("cloud",), **trust: Any) -> None:
        """``trust``: further fields of every client's trust file."""
        self._roots = {name: new_root() for name in names}
        self._keys: dict[tuple[str, str], Any] = {}
        self.trust = Trust(roots={name: public for name, (_, public) in self._roots.items()}, **trust)

    def files(self, directory: Path, party: str = "", pool: str = POOL) -> None:
        """Write the files of one of a party's clients. Default: the first party."""
        party = party or next(iter(self._roots))
        if (party, pool) not in self._keys:
            self._keys[party, pool] = issue(self._roots[party][0], party, UID, pool)
        key, credential = self._keys[party, pool]
        write_party_files(directory, key, credential, self.trust)

    def start_client(
        self, job: Federation, script: Path, index: int = 0, attempt: int = 0, party: str = "", **env: str
    ) -> Forked:
        """Start a client of the only pool, as one of a party's."""
        environment = job.client_environment(index, attempt, **env)
        self.files(job.directory / f"client-{index}-{attempt}", party)
        return job.start(f"client-{index}-{attempt}", [script], environment)
