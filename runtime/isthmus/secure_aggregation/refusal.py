"""Reasons for which a client leaves an instance, or the server drops a client."""

from collections.abc import Iterable
from enum import StrEnum

from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.text import one_line


class Reason(StrEnum):
    """A reason in one word: the metric isthmus_secure_faults_total has it as a label."""

    ALONE = "alone"
    """Without one foreign party's clients, this client would be the only one: that party could subtract its own."""
    BASE = "base"
    """The update was trained from another model than the instance is for."""
    BLAMED = "blamed"
    """Most of the other clients object to this client's entry."""
    CHANGED = "changed"
    """A message was sent again with another content."""
    CLIENTS = "clients"
    """Too few clients."""
    CONSENTS = "consents"
    """Too few of a client's neighbours have signed the same survivors."""
    CREDENTIAL = "credential"
    """A credential is malformed, of an unknown party, or for another job or pool."""
    DUPLICATE = "duplicate"
    """A client or a key occurs twice."""
    ENTRY = "entry"
    """A client's own entry is missing or was changed, or an entry is not its sender's."""
    HOLDERS = "holders"
    """One foreign party holds enough shares to open the update."""
    INCARNATION = "incarnation"
    """The incarnation is not above all earlier ones."""
    KEY = "key"
    """A public key or a commitment is malformed."""
    LAYOUT = "layout"
    """The begin of an instance is malformed."""
    NOISE = "noise"
    """The clients add less noise than this client's site demands."""
    NONCE = "nonce"
    """A nonce does not fit its commitment, or was replaced."""
    OPENED = "opened"
    """The update is in a sum already that was opened, or may have been."""
    ORDER = "order"
    """A message came in the wrong phase."""
    OTHER = "other"
    """Any word that is not listed here."""
    PARTIES = "parties"
    """Too few distinct parties."""
    RETRAINED = "retrained"
    """The round was done again already."""
    REUSE = "reuse"
    """Masks would cover a second update."""
    ROUND = "round"
    """The round is older than one whose sum was opened."""
    SENDERS = "senders"
    """The list of clients that sent shares is malformed, or too short."""
    SHARES = "shares"
    """Shares are missing, malformed, or do not give the secret."""
    SIGNATURE = "signature"
    """A signature is wrong."""
    SIZE = "size"
    """A message is too large."""
    STRANGER = "stranger"
    """The sender is no participant."""
    SURVIVORS = "survivors"
    """The list of survivors is malformed, or too short."""
    UNCONTRIBUTED = "uncontributed"
    """The client is in the list of survivors, but sent no update."""


class Refusal(Exception):
    """A demand or a message that must not be followed. ``str()`` is one line: what, where, and how to fix it."""

    def __init__(self, reason: Reason, message: str, entries: Iterable[int] = ()) -> None:
        """``entries``: of the roster, those that are at fault."""
        super().__init__(one_line(message))
        self.reason = reason
        self.entries = tuple(entries)

    def answer(self, incarnation: int) -> pb.SecureClientMessage:
        """Return the message that tells the server."""
        refusal = pb.SecureRefusal(reason=self.reason, message=str(self), entries=self.entries)
        return pb.SecureClientMessage(incarnation=incarnation, refusal=refusal)
