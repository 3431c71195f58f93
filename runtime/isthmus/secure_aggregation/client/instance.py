"""A client's side of one instance."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.wire.parties import Signer, Trust

from .. import transcript
from ..parameters import NONCE_BYTES, SEED_BYTES, UpdateKey, point
from ..primitives.keys import KeyAgreementError, RoundKeys, pair_mask, self_mask_key
from ..primitives.shamir import split
from ..primitives.shares import SharePair, SharesError, open_sealed, seal
from ..refusal import Reason, Refusal
from ..roster import CredentialCache, Roster, credential_message, name_of
from ..transcript import Terms


@dataclass(frozen=True)
class Identity:
    """The client that takes part."""

    job_uid: str
    pool: str
    index: int
    attempt: int
    instance: str
    signer: Signer


@dataclass(frozen=True)
class Masks:
    """Keys of the masks that cover one update (``masks.add_masks``)."""

    self_seed: bytes
    """Key of the self mask, which is added. It is derived from the seed that the shares give."""
    pairwise: list[tuple[bytes, int]]
    """Keys of the masks with each neighbour, and their signs."""

    @property
    def keys(self) -> list[tuple[bytes, int]]:
        """All keys with their signs."""
        return [(self.self_seed, 1), *self.pairwise]


class Instance:
    """A client's secrets and state in one instance.

    The server's steps come in a fixed order. Each is answered once; where it comes again, with the same bytes.
    """

    def __init__(self, identity: Identity, begin: pb.SecureBegin, trust: Trust, credentials: CredentialCache) -> None:
        self.begin = begin
        self.covers: UpdateKey | None = None
        """The update that the masks cover."""
        self.masks: Masks | None = None
        self.consented = False
        """True if the client has signed a list of survivors."""
        self.over = False
        """True if the server has ended the instance."""
        self._trust = trust
        self._credentials = credentials
        self._signer = identity.signer
        self._terms = Terms.of(identity.job_uid, begin)
        self._keys = RoundKeys.generate()
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._seed = secrets.token_bytes(SEED_BYTES)
        self._entry = self._signed_entry(identity)
        self._roster: Roster | None = None
        self._held: dict[int, SharePair] = {}
        self._senders: frozenset[int] = frozenset()
        self._survivors: frozenset[int] = frozenset()
        self._next = "roster"
        self._answered: dict[str, tuple[bytes, list[pb.SecureClientMessage]]] = {}

    def advertise(self) -> list[pb.SecureClientMessage]:
        """Return the answer to the begin."""
        return [self._message(advertise=pb.SecureAdvertise(entry=self._entry))]

    def receive(self, message: pb.SecureServerMessage) -> list[pb.SecureClientMessage]:
        """Take a step after the begin. Raises ``Refusal``."""
        step = message.WhichOneof("step")
        if self.over and step not in self._answered:
            return []
        steps: dict[str, Callable[[Any], list[pb.SecureClientMessage]]] = {
            "roster": self._take_roster, "nonces": self._take_nonces, "shares": self._take_shares,
            "survivors": self._take_survivors, "consents": self._take_consents,
        }  # fmt: skip
        if step not in steps:
            raise Refusal(Reason.ORDER, f"a step came that this version does not know: {step}")
        content = message.SerializeToString(deterministic=True)
        if step in self._answered:
            before, answers = self._answered[step]
            # The answer to consents depends on the survivors alone, which are signed: later consents do not matter.
            if content != before and step != "consents":
                raise Refusal(Reason.CHANGED, f"{step} came a second time with another content")
            return answers
        if step != self._next:
            raise Refusal(Reason.ORDER, f"{step} came where {self._next or 'nothing'} was expected")
        answers = steps[step](getattr(message, step))
        self._answered[step] = (content, answers)
        return answers

    def retire(self) -> None:
        """Forget all secrets. What was answered is still answered in the same way."""
        self.over = True
        self.masks = None
        self._keys = RoundKeys.generate()
        self._nonce = self._seed = b""
        self._held.clear()

    def _signed_entry(self, identity: Identity) -> pb.SecureEntry:
        pool, index = identity.pool, identity.index
        entry = pb.SecureEntry(
            pool=pool, index=index, attempt=identity.attempt, instance=identity.instance,
            mask_key=self._keys.mask_public, share_key=self._keys.share_public,
            nonce_commitment=transcript.nonce_commitment(self._terms, pool, index, self._nonce),
            seed_commitment=transcript.seed_commitment(self._terms, pool, index, self._seed),
            credential=credential_message(identity.signer.credential),
        )  # fmt: skip
        entry.signature = identity.signer.sign(transcript.entry_text(self._terms, entry))
        return entry

    def _take_roster(self, message: pb.SecureRoster) -> list[pb.SecureClientMessage]:
        most = self.begin.layout.max_clients
        self._roster = Roster(self._terms, message.entries, self._entry, self._trust, self._credentials, most)
        if self._roster.complete:
            return self._share()
        self._next = "nonces"
        return [self._message(reveal=pb.SecureReveal(nonce=self._nonce))]

    def _take_nonces(self, message: pb.SecureNonces) -> list[pb.SecureClientMessage]:
        self._known.settle(message.nonces, self._nonce)
        return self._share()

    def _share(self) -> list[pb.SecureClientMessage]:
        """Split both secrets among the holders. The own shares are kept."""
        roster, scope = self._known, self._terms.scope
        points = [point(holder) for holder in sorted(roster.holders)]
        seeds = split(self._seed, roster.threshold, points)
        mask_keys = split(self._keys.mask_secret_bytes, roster.threshold, points)
        sealed = []
        for peer in sorted(roster.neighbours):
            pair = SharePair(seeds[point(peer)], mask_keys[point(peer)])
            secret = self._agree(self._keys.agree_share, roster.entries[peer].share_key, peer)
            ciphertext = seal(secret, scope, roster.own, peer, roster.digest, pair)
            sealed.append(pb.SecureSealed(peer=peer, ciphertext=ciphertext))
        self._held = {roster.own: SharePair(seeds[point(roster.own)], mask_keys[point(roster.own)])}
        self._next = "shares"
        return [self._message(shares=pb.SecureShares(sealed=sealed))]

    def _take_shares(self, message: pb.SecureShares) -> list[pb.SecureClientMessage]:
        roster = self._known
        senders = _ascending(message.senders, Reason.SENDERS, "senders of shares")
        if not senders <= set(roster.members):
            raise Refusal(Reason.SENDERS, "the senders of shares are not all in the roster")
        self._need(senders, Reason.SENDERS, "have sent shares")
        peers = roster.neighbours & senders
        if [sealed.peer for sealed in message.sealed] != sorted(peers):
            raise Refusal(Reason.SHARES, "the shares are not those of this client's neighbours that have sent some")
        unusable = []
        for sealed in message.sealed:
            secret = self._agree(self._keys.agree_share, roster.entries[sealed.peer].share_key, sealed.peer)
            try:
                self._held[sealed.peer] = open_sealed(
                    secret, self._terms.scope, sealed.peer, roster.own, roster.digest, sealed.ciphertext
                )
            except SharesError:
                unusable.append(sealed.peer)
        self._senders = senders
        self.masks = self._agree_on_masks(peers)
        self._next = "survivors"
        return [self._message(complaint=pb.SecureComplaint(entries=unusable))] if unusable else []

    def _agree_on_masks(self, peers: frozenset[int]) -> Masks:
        roster, scope = self._known, self._terms.scope
        pairwise = []
        for peer in sorted(peers):
            secret = self._agree(self._keys.agree_mask, roster.entries[peer].mask_key, peer)
            pairwise.append(pair_mask(secret, scope, roster.own, peer))
        return Masks(self_mask_key(self._seed, scope, roster.own), pairwise)

    def _take_survivors(self, message: pb.SecureSurvivors) -> list[pb.SecureClientMessage]:
        roster = self._known
        survivors = _ascending(message.entries, Reason.SURVIVORS, "survivors")
        if not survivors <= self._senders:
            raise Refusal(Reason.SURVIVORS, "there are survivors that have sent no shares")
        self._need(survivors, Reason.SURVIVORS, "have survived")
        if self.covers is None:
            raise Refusal(Reason.UNCONTRIBUTED, "this client is among the survivors, but has sent no update")
        if len(survivors) < self.begin.layout.noise.contributors:
            raise Refusal(
                Reason.SURVIVORS,
                f"{len(survivors)} clients have survived, but the noise hides a sum of "
                f"{self.begin.layout.noise.contributors} or more",
            )
        roster.vouch(survivors, "the survivors")
        self._survivors = survivors
        self.consented = True
        self._next = "consents"
        return [
            self._message(consent=pb.SecureConsent(signature=self._signer.sign(self._consent_text(self._known.own))))
        ]

    def _take_consents(self, message: pb.SecureConsents) -> list[pb.SecureClientMessage]:
        roster = self._known
        asked = (roster.neighbours & self._survivors) - {roster.own}
        agreed = {roster.own}
        for each in message.signatures:
            if each.entry in asked and each.entry not in agreed and roster.verify_signature(
                each.entry, self._consent_text(each.entry), each.signature
            ):  # fmt: skip
                agreed.add(each.entry)
        if len(agreed) < roster.threshold:
            raise Refusal(
                Reason.CONSENTS,
                f"{len(agreed)} of the {len(roster.holders)} clients that share secrets with this one have signed "
                f"the same survivors; {roster.threshold} are needed",
            )
        self._next = ""
        shares = [self._share_for(entry) for entry in sorted(roster.holders & self._held.keys() & self._senders)]
        return [self._message(unmask=pb.SecureUnmask(shares=shares))]

    def _share_for(self, entry: int) -> pb.SecureShare:
        """Return one share of one kind: the two kinds together would open the entry's update."""
        if entry in self._survivors:
            return pb.SecureShare(entry=entry, self_seed_share=self._held[entry].self_seed)
        return pb.SecureShare(entry=entry, mask_key_share=self._held[entry].mask_key)

    def _need(self, entries: frozenset[int], reason: Reason, what: str) -> None:
        """Check that this client, and enough of those that hold its shares, are among the entries."""
        roster = self._known
        if roster.own not in entries:
            raise Refusal(reason, f"this client is not among those that {what}")
        held = len(roster.holders & entries)
        if held < roster.threshold:
            raise Refusal(
                reason,
                f"only {held} of the {len(roster.holders)} clients that share secrets with this one {what}; "
                f"{roster.threshold} are needed",
            )

    def _agree(self, agree: Callable[[bytes], bytes], public: bytes, peer: int) -> bytes:
        try:
            return agree(public)
        except KeyAgreementError as error:
            where = f"entry {peer} ({name_of(self._known.entries[peer])})"
            raise Refusal(Reason.KEY, f"{where}: {error}", [peer]) from error

    @property
    def _known(self) -> Roster:
        assert self._roster is not None
        return self._roster

    def _consent_text(self, signer: int) -> bytes:
        return transcript.consent_text(self._terms, self._known.digest, self._senders, self._survivors, signer)

    def _message(self, **step: Any) -> pb.SecureClientMessage:
        return pb.SecureClientMessage(incarnation=self.begin.incarnation, **step)


def _ascending(entries: Any, reason: Reason, what: str) -> frozenset[int]:
    numbers = list(entries)
    if any(first >= second for first, second in pairwise(numbers)):
        raise Refusal(reason, f"the list of {what} is not ascending: an entry may be in it twice")
    return frozenset(numbers)
