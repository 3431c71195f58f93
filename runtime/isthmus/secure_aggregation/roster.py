"""The participants of an instance as a client sees them, and its checks of them."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from isthmus_contracts import secure_sums
from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.secure_sums import FEWEST_CLIENTS
from isthmus_contracts.wire.parties import Credential, PartyError, Trust, verify_signature

from . import graph, transcript
from .parameters import (
    HASH_BYTES,
    LONGEST_NAME,
    MOST_BYTES,
    NONCE_BYTES,
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
)
from .refusal import Reason, Refusal
from .transcript import Terms

# The field of X25519. The top bit of a key is ignored, so a key has several encodings unless they are refused.
_FIELD = 2**255 - 19
_REMEMBERED_CREDENTIALS = 10_000
_LENGTHS = {
    "mask_key": PUBLIC_KEY_BYTES,
    "share_key": PUBLIC_KEY_BYTES,
    "nonce_commitment": HASH_BYTES,
    "seed_commitment": HASH_BYTES,
    "signature": SIGNATURE_BYTES,
}


class CredentialCache:
    """Checks of credentials, each made once. One cache serves one job."""

    def __init__(self, trust: Trust, job_uid: str) -> None:
        self._trust = trust
        self._job_uid = job_uid
        self._genuine: set[bytes] = set()

    def verify(self, entry: pb.SecureEntry, number: int) -> None:
        """Check that a trusted party vouches for the entry's key. Raises ``Refusal``."""
        text = entry.pool.encode() + b"\0" + entry.credential.SerializeToString(deterministic=True)
        if text in self._genuine:
            return
        try:
            self._trust.verify(credential_of(entry), self._job_uid)
        except PartyError as error:
            raise Refusal(
                Reason.CREDENTIAL, f"entry {number} ({name_of(entry)}) of the roster: {error}", [number]
            ) from error
        if len(self._genuine) >= _REMEMBERED_CREDENTIALS:
            self._genuine.clear()
        self._genuine.add(text)


class Roster:
    """The fixed set of the clients of an instance, in the view of one client.

    Up to 32 clients the graph is complete. Beyond, :meth:`settle` takes the nonces that fix the graph. A
    client then checks the signatures of its neighbours, and of as many others as its trust demands clients and parties.
    """

    def __init__(
        self, terms: Terms, entries: Sequence[pb.SecureEntry], own: pb.SecureEntry, trust: Trust,
        credentials: CredentialCache, most: int,
    ) -> None:  # fmt: skip
        """Check a roster. ``own``: the entry that the client sent; ``most``: the layout's limit. Raises ``Refusal``."""
        self._terms = terms
        self._trust = trust
        self.entries = tuple(entries)
        if len(entries) > most:
            raise Refusal(
                Reason.CLIENTS, f"the roster has {len(entries)} clients, but the sum of at most {most} fits the ring"
            )
        self._check_all()
        self.own = self._find(own)
        for number, entry in enumerate(self.entries):
            credentials.verify(entry, number)
        self.parties = [entry.credential.party for entry in self.entries]
        self._verified = {self.own}
        self._digest = transcript.entries_digest(terms, self.entries)
        self.complete = len(entries) <= graph.COMPLETE_UP_TO
        self.members: tuple[int, ...] = ()
        """The entries that take part in the graph; empty before it is settled."""
        self.neighbours: frozenset[int] = frozenset()
        self.digest = b""
        if self.complete:
            self._settle(range(len(entries)), b"")
        else:
            self._check_size(range(len(entries)))

    @property
    def holders(self) -> frozenset[int]:
        """The entries that hold shares of this client's secrets: its neighbours and itself."""
        return self.neighbours | {self.own}

    @property
    def threshold(self) -> int:
        """Number of shares that recover a secret of this client."""
        foreign = graph.largest_foreign(self.parties[self.own], (self.parties[each] for each in self.neighbours))
        return secure_sums.threshold(len(self.holders), foreign)

    def settle(self, nonces: Sequence[bytes], own_nonce: bytes) -> None:
        """Fix the graph by the nonces of all entries; a client without one takes no part. Raises ``Refusal``."""
        if len(nonces) != len(self.entries):
            raise Refusal(Reason.NONCE, f"{len(nonces)} nonces came for {len(self.entries)} clients")
        if nonces[self.own] != own_nonce:
            raise Refusal(Reason.NONCE, "the nonce of this client was left out or replaced")
        for number, (entry, nonce) in enumerate(zip(self.entries, nonces, strict=True)):
            if nonce:
                check_nonce(self._terms, entry, nonce, number)
        members = [number for number, nonce in enumerate(nonces) if nonce]
        self._settle(members, transcript.graph_seed(self._terms, self._digest, filter(None, nonces)))

    def vouch(self, entries: Collection[int], what: str) -> None:
        """Check that the client's trust accepts a set of entries, itself included, as those of a sum.

        Raises ``Refusal``. Entries count whose signatures are right: the server could invent others under genuine
        credentials.
        """
        self._check_size(entries, what)
        for number in self._missing(sorted(entries)):
            self._verify(number)
        others = {self.parties[number] for number in entries if number != self.own and number in self._verified}
        if self._trust.min_parties > 1 and others and len(others) == 1 and self.parties[self.own] not in others:
            raise Refusal(
                Reason.ALONE,
                f"{what}: this client and clients of party {others.pop()!r} only, who could subtract their own updates",
            )

    def verify_signature(self, number: int, text: bytes, signature: bytes) -> bool:
        """Return True if the client of an entry has signed the text."""
        try:
            verify_signature(self.entries[number].credential.public_key, text, signature)
        except PartyError:
            return False
        return True

    def _check_all(self) -> None:
        keys: set[bytes] = set()
        for number, entry in enumerate(self.entries):
            check_form(entry, number)
            if number and _place(self.entries[number - 1]) >= _place(entry):
                raise Refusal(
                    Reason.DUPLICATE,
                    f"entry {number} ({name_of(entry)}) of the roster is a duplicate, or out of order", [number],
                )  # fmt: skip
            keys |= {entry.mask_key, entry.share_key}
            if len(keys) != 2 * (number + 1):
                raise Refusal(
                    Reason.DUPLICATE, f"entry {number} ({name_of(entry)}) of the roster has a key of another", [number]
                )

    def _find(self, own: pb.SecureEntry) -> int:
        for number, entry in enumerate(self.entries):
            if entry == own:
                return number
        changed = any(_place(entry) == _place(own) for entry in self.entries)
        raise Refusal(Reason.ENTRY, f"this client's entry {'was changed' if changed else 'is missing'} in the roster")

    def _check_size(self, entries: Collection[int], what: str = "the roster") -> None:
        fewest = max(FEWEST_CLIENTS, self._trust.min_clients)
        if len(entries) < fewest:
            raise Refusal(Reason.CLIENTS, f"{what}: {len(entries)} clients, but this site demands {fewest}")
        parties = {self.parties[number] for number in entries}
        if len(parties) < self._trust.min_parties:
            raise Refusal(
                Reason.PARTIES,
                f"{what}: clients of {len(parties)} parties ({', '.join(sorted(parties)[:5])}), "
                f"but this site demands {self._trust.min_parties}",
            )

    def _settle(self, members: Sequence[int], seed: bytes) -> None:
        self.members = tuple(members)
        if len(members) < FEWEST_CLIENTS:
            raise Refusal(Reason.CLIENTS, f"only {len(members)} clients revealed their nonces")
        adjacent = graph.neighbours_of(self.members.index(self.own), len(members), seed)
        self.neighbours = frozenset(self.members[place] for place in adjacent)
        self._check_holders()
        for number in sorted(self.neighbours):
            self._verify(number)
        self.vouch(self.members, "the roster")
        self.digest = transcript.roster_digest(self._terms, self._digest, self.members, seed)

    def _check_holders(self) -> None:
        own_party = self.parties[self.own]
        held = Counter(self.parties[number] for number in self.neighbours)
        # The threshold grows with the largest party, so this bound is the one without it.
        most = secure_sums.threshold(len(self.holders)) - 1
        for party, shares in sorted(held.items()):
            if party != own_party and shares > most:
                raise Refusal(
                    Reason.HOLDERS,
                    f"party {party!r} holds {shares} of the {len(self.holders)} shares of this client's secrets; "
                    f"at most {most} may be of one other party",
                )

    def _missing(self, entries: Sequence[int]) -> Iterator[int]:
        """Yield entries to verify, until clients and parties that count are enough."""
        own_party = self.parties[self.own]
        parties = {self.parties[number] for number in entries if number in self._verified and number != self.own}
        lacking = max(FEWEST_CLIENTS, self._trust.min_clients) - sum(number in self._verified for number in entries)
        later = []
        # One of each party first, also of the own one, since a client that is alone with another party refuses.
        for number in entries:
            if number in self._verified:
                continue
            enough = len(parties | {own_party}) >= self._trust.min_parties and (
                len(parties) > 1 or own_party in parties
            )
            if self.parties[number] in parties or enough:
                later.append(number)
            else:
                parties.add(self.parties[number])
                lacking -= 1
                yield number
        yield from later[: max(0, lacking)]

    def _verify(self, number: int) -> None:
        if number not in self._verified:
            check_signature(self._terms, self.entries[number], number)
            self._verified.add(number)


def check_form(entry: pb.SecureEntry, number: int) -> None:
    """Check lengths and encodings of an entry. Raises ``Refusal``."""
    where = f"entry {number} ({name_of(entry)})"
    for field, length in _LENGTHS.items():
        if len(getattr(entry, field)) != length:
            raise Refusal(Reason.KEY, f"{where}: {field} does not have {length} bytes", [number])
    for field in ("mask_key", "share_key"):
        if int.from_bytes(getattr(entry, field), "little") >= _FIELD:
            raise Refusal(Reason.KEY, f"{where}: {field} is not a key of X25519 in its canonical form", [number])
    if len(entry.instance) > LONGEST_NAME or entry.ByteSize() > MOST_BYTES:
        raise Refusal(Reason.SIZE, f"{where} is too large", [number])


def check_nonce(terms: Terms, entry: pb.SecureEntry, nonce: bytes, number: int) -> None:
    """Check a nonce against the entry's commitment. Raises ``Refusal``."""
    fits = transcript.nonce_commitment(terms, entry.pool, entry.index, nonce) == entry.nonce_commitment
    if len(nonce) != NONCE_BYTES or not fits:
        raise Refusal(
            Reason.NONCE, f"entry {number} ({name_of(entry)}): the nonce does not fit its commitment", [number]
        )


def check_signature(terms: Terms, entry: pb.SecureEntry, number: int) -> None:
    """Check that the holder of the credential's key signed the entry for these terms. Raises ``Refusal``."""
    text = transcript.entry_text(terms, entry)
    try:
        verify_signature(entry.credential.public_key, text, entry.signature, f"entry {number} ({name_of(entry)})")
    except PartyError as error:
        raise Refusal(
            Reason.SIGNATURE, f"{error}: it is forged, or made for another instance, base model or layout", [number]
        ) from error


def credential_of(entry: pb.SecureEntry) -> Credential:
    """Return an entry's credential. Raises ``PartyError`` if it is malformed, or for another pool."""
    each = entry.credential
    if each.pool != entry.pool:
        raise PartyError(f"the credential is for pool {each.pool[:64]!r}, not {entry.pool[:64]!r}")
    return Credential(each.party, each.job_uid, each.pool, each.public_key, each.signature)


def credential_message(credential: Credential) -> pb.SecureCredential:
    """Return a credential as entries have it."""
    return pb.SecureCredential(
        party=credential.party, job_uid=credential.job_uid, pool=credential.pool,
        public_key=credential.public_key, signature=credential.signature,
    )  # fmt: skip


def name_of(entry: pb.SecureEntry) -> str:
    return f"{entry.pool[:64]}/{entry.index}"


def _place(entry: pb.SecureEntry) -> tuple[str, int]:
    return entry.pool, entry.index
