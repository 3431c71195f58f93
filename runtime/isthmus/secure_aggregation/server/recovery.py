"""Recovery of the secrets that the masks in a sum were made from."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from isthmus_contracts.pb import secure_aggregation_pb2 as pb

from .. import transcript
from ..parameters import point
from ..primitives.keys import agree, pair_mask, public_key, self_mask_key
from ..primitives.shamir import ShamirError, combine
from .setup import Setup

# A secret is tried with the threshold's number of shares, and with one more, in case one is wrong. More wrong ones wait
# until all shares are there.
_EARLY_TRIALS = 2


@dataclass
class Secrets:
    """The secrets of an instance that its holders' shares give.

    Of a survivor it is the seed of the self mask, of a client that sent no update the mask key: never both.
    """

    setup: Setup
    """Setup with its survivors fixed; it does not change any more."""
    found: dict[int, bytes] = field(default_factory=dict)
    wrong: dict[int, set[int]] = field(default_factory=dict)
    """The entries for which a holder's shares are wrong, by holder."""
    _shares: dict[int, dict[int, bytes]] = field(default_factory=dict)

    @cached_property
    def _wanted(self) -> frozenset[int]:
        return self.setup.survivors | self.setup.dropouts

    @property
    def missing(self) -> frozenset[int]:
        """Entries whose secret is not known yet."""
        return self._wanted - self.found.keys()

    def add(self, holder: int, shares: Iterable[pb.SecureShare]) -> None:
        """Take a holder's shares, and recover the secrets for which they are enough."""
        for share in shares:
            if share.entry in self._wanted:
                points = self._shares.setdefault(share.entry, {})
                points[point(holder)] = share.self_seed_share or share.mask_key_share
                enough = len(points) - self.setup.threshold(share.entry)
                if share.entry not in self.found and 0 <= enough < _EARLY_TRIALS:
                    self._try(share.entry)

    def conclude(self) -> frozenset[int]:
        """Recover what is left, with all shares. Return the entries whose secret cannot be recovered."""
        for entry in sorted(self.missing):
            self._try(entry)
        return self.missing

    def shortage(self) -> dict[int, int]:
        """Return the number of shares of each entry for which there are fewer than its threshold."""
        counts = {entry: len(self._shares.get(entry, {})) for entry in self.missing}
        return {entry: count for entry, count in counts.items() if count < self.setup.threshold(entry)}

    def plan(self) -> list[tuple[bytes, int]]:
        """Return the keys of the masks in the survivors' sum, with their signs. All secrets must be known."""
        setup, scope = self.setup, self.setup.terms.scope
        remaining = [(self_mask_key(self.found[entry], scope, entry), 1) for entry in sorted(setup.survivors)]
        for entry in sorted(setup.dropouts):
            for peer in sorted(setup.neighbours[entry] & setup.survivors):
                secret = agree(self.found[entry], setup.entries[peer].mask_key)
                remaining.append(pair_mask(secret, scope, peer, entry))
        return remaining

    def _try(self, entry: int) -> None:
        shares = self._shares.get(entry, {})
        try:
            secret, wrong = combine(shares, self.setup.threshold(entry), lambda value: self._fits(entry, value))
        except ShamirError:
            return
        self.found[entry] = secret
        for holder in self.setup.holders(entry):
            if point(holder) in wrong:
                self.wrong.setdefault(holder, set()).add(entry)

    def _fits(self, entry: int, secret: bytes) -> bool:
        known = self.setup.entries[entry]
        if entry in self.setup.survivors:
            commitment = transcript.seed_commitment(self.setup.terms, known.pool, known.index, secret)
            return commitment == known.seed_commitment
        return public_key(secret) == known.mask_key
