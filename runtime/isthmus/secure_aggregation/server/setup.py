"""Facts of an instance that all its clients know: who takes part, who shares secrets with whom, whose updates count."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from isthmus_contracts import secure_sums
from isthmus_contracts.pb import secure_aggregation_pb2 as pb

from .. import graph, transcript
from ..parameters import ClientId
from ..roster import name_of
from ..transcript import Terms


@dataclass
class Setup:
    """The roster and the graph, and the clients that have come from step to step."""

    terms: Terms
    entries: Sequence[pb.SecureEntry] = ()
    """The roster, in the order of (pool, index)."""
    numbers: dict[ClientId, int] = field(default_factory=dict)
    nonces: Sequence[bytes] = ()
    neighbours: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """Neighbours of each entry in the graph."""
    digest: bytes = b""
    senders: frozenset[int] = frozenset()
    survivors: frozenset[int] = frozenset()
    unusable: dict[int, set[int]] = field(default_factory=dict)
    """The holders that cannot open an entry's shares, by entry."""
    _thresholds: dict[int, int] = field(default_factory=dict)

    def fix_entries(self, entries: Iterable[pb.SecureEntry]) -> None:
        """Fix the roster."""
        self.entries = sorted(entries, key=id_of)
        self.numbers = {id_of(entry): number for number, entry in enumerate(self.entries)}

    @property
    def complete(self) -> bool:
        """True if all are each other's neighbours: no nonces are needed."""
        return len(self.entries) <= graph.COMPLETE_UP_TO

    def fix_graph(self, nonces: Mapping[int, bytes]) -> None:
        """Fix the graph: of all entries if it is complete, otherwise of those with a nonce."""
        entries = transcript.entries_digest(self.terms, self.entries)
        members: Sequence[int] = range(len(self.entries))
        seed = b""
        if not self.complete:
            members = sorted(nonces)
            self.nonces = [nonces.get(number, b"") for number in range(len(self.entries))]
            seed = transcript.graph_seed(self.terms, entries, nonces.values())
        adjacent = graph.neighbours(len(members), seed)
        self.neighbours = {
            member: frozenset(members[place] for place in places)
            for member, places in zip(members, adjacent, strict=True)
        }
        parties = [entry.credential.party for entry in self.entries]
        for member, adjacent_entries in self.neighbours.items():
            foreign = graph.largest_foreign(parties[member], (parties[each] for each in adjacent_entries))
            self._thresholds[member] = secure_sums.threshold(len(adjacent_entries) + 1, foreign)
        self.digest = transcript.roster_digest(self.terms, entries, members, seed)

    @property
    def largest_threshold(self) -> int:
        """The largest number of shares that recover a secret of an entry; 0 before the graph is fixed."""
        return max(self._thresholds.values(), default=0)

    def fix_senders(self, senders: Collection[int]) -> None:
        """Fix whose shares are forwarded: of these, the clients of which enough holders have sent shares, too."""
        left = set(senders)
        # Without some, others may have too few.
        while few := {entry for entry in left if len(self.holders(entry) & left) < self.threshold(entry)}:
            left -= few
        self.senders = frozenset(left)

    @property
    def dropouts(self) -> frozenset[int]:
        """Entries without an update whose masks are in the update of a survivor."""
        return frozenset(entry for entry in self.senders - self.survivors if self.neighbours[entry] & self.survivors)

    def holders(self, entry: int) -> frozenset[int]:
        """Return the entries that hold shares of an entry's secrets, itself included."""
        return self.neighbours[entry] | {entry}

    def threshold(self, entry: int) -> int:
        """Return the number of shares that recover a secret of an entry."""
        return self._thresholds[entry]

    def parties_of(self, entries: Iterable[int]) -> set[str]:
        return {self.entries[entry].credential.party for entry in entries}

    def shortage(self, chosen: frozenset[int], present: frozenset[int], fewest: int, parties: int) -> str:
        """Return why the sum of the chosen entries' updates could not be opened by those present; or nothing."""
        if len(chosen) < fewest:
            return f"{len(chosen)} clients have contributed; at least {fewest} must"
        found = self.parties_of(chosen)
        if len(found) < parties:
            return f"clients of {len(found)} parties have contributed; the job asks for {parties}"
        for party in found if parties > 1 else ():
            if sum(self.entries[entry].credential.party != party for entry in chosen) == 1:
                return f"clients of party {party!r} and one other have contributed: the party could read the other's"
        for entry in sorted(present):
            if (held := len(self.holders(entry) & chosen)) < self.threshold(entry):
                return f"of {self._named(entry)} {held} holders have contributed; {self.threshold(entry)} must"
        hidden = self.senders - chosen
        for entry in sorted(chosen | {each for each in hidden if self.neighbours[each] & chosen}):
            answers = len((self.holders(entry) & present) - self.unusable.get(entry, set()))
            if answers < self.threshold(entry):
                return (
                    f"{answers} holders of {self._named(entry)}'s shares are left; {self.threshold(entry)} are needed"
                )
        return ""

    def _named(self, entry: int) -> str:
        return name_of(self.entries[entry])


def id_of(entry: pb.SecureEntry) -> ClientId:
    return entry.pool, entry.index
