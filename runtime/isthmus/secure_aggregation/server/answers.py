"""The answers of the clients of an instance."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.wire.parties import verify_signature

from .. import transcript
from ..parameters import ClientId, Participant
from ..refusal import Reason, Refusal
from ..roster import check_nonce
from . import messages
from .messages import CheckCredential
from .recovery import Secrets
from .setup import Setup


@dataclass
class Answers:
    """The valid answers by step; entries are named by their numbers in the roster."""

    setup: Setup
    participants: Mapping[ClientId, Participant]
    check_credential: CheckCredential | None
    entries: dict[ClientId, pb.SecureEntry] = field(default_factory=dict)
    keys: set[bytes] = field(default_factory=set)
    """All public keys of the entries."""
    nonces: dict[int, bytes] = field(default_factory=dict)
    sealed: dict[int, dict[int, bytes]] = field(default_factory=dict)
    """Sealed shares by sender, and then by receiver."""
    consents: dict[int, bytes] = field(default_factory=dict)
    unmasks: dict[int, pb.SecureUnmask] = field(default_factory=dict)
    blames: dict[int, set[ClientId]] = field(default_factory=dict)
    """The clients that object to an entry, by entry."""
    secrets: Secrets | None = None
    """Recovered from the answers to UNMASK, once these are asked for."""

    def take(self, who: ClientId, step: str, message: Any) -> None:
        """Take a client's answer to a step. Raises ``Refusal`` if it is invalid, without effect."""
        takes: dict[str, Callable[[ClientId, Any], None]] = {
            "advertise": self._take_advertise, "reveal": self._take_reveal, "shares": self._take_shares,
            "consent": self._take_consent, "unmask": self._take_unmask,
            "refusal": self._take_refusal, "complaint": self._take_complaint,
        }  # fmt: skip
        takes[step](who, message)

    def add_unmask(self, number: int, unmask: pb.SecureUnmask) -> None:
        """Take a valid answer to UNMASK."""
        assert self.secrets is not None
        self.unmasks[number] = unmask
        self.secrets.add(number, unmask.shares)

    def _take_advertise(self, who: ClientId, message: pb.SecureAdvertise) -> None:
        entry, terms = message.entry, self.setup.terms
        messages.check_entry(entry, terms, self.participants[who], self.keys, self.check_credential)
        self.entries[who] = entry
        self.keys |= {entry.mask_key, entry.share_key}

    def _take_reveal(self, who: ClientId, message: pb.SecureReveal) -> None:
        number = self.setup.numbers[who]
        check_nonce(self.setup.terms, self.setup.entries[number], message.nonce, number)
        self.nonces[number] = message.nonce

    def _take_shares(self, who: ClientId, message: pb.SecureShares) -> None:
        number = self.setup.numbers[who]
        messages.check_shares(message, self.setup.neighbours[number])
        self.sealed[number] = {sealed.peer: sealed.ciphertext for sealed in message.sealed}

    def _take_complaint(self, who: ClientId, message: pb.SecureComplaint) -> None:
        number = self.setup.numbers[who]
        peers = self.setup.neighbours[number] & self.setup.senders
        if not message.entries or not peers.issuperset(message.entries):
            raise Refusal(Reason.SHARES, "the complaint is not about neighbours that have sent shares")
        for entry in message.entries:
            self.setup.unusable.setdefault(entry, set()).add(number)

    def _take_consent(self, who: ClientId, message: pb.SecureConsent) -> None:
        setup = self.setup
        number = setup.numbers[who]
        text = transcript.consent_text(setup.terms, setup.digest, setup.senders, setup.survivors, number)
        key = setup.entries[number].credential.public_key
        messages.check_consent(message, lambda signature: verify_signature(key, text, signature))
        self.consents[number] = message.signature

    def _take_unmask(self, who: ClientId, message: pb.SecureUnmask) -> None:
        setup = self.setup
        number = setup.numbers[who]
        held = setup.holders(number) & setup.senders
        expected = {entry: entry in setup.survivors for entry in held if number not in setup.unusable.get(entry, ())}
        messages.check_unmask(message, expected)
        self.add_unmask(number, message)

    def _take_refusal(self, who: ClientId, message: pb.SecureRefusal) -> None:
        for entry in message.entries:
            if entry < len(self.setup.entries) and who in self.setup.numbers:
                self.blames.setdefault(entry, set()).add(who)
