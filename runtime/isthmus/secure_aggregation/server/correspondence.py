"""Messages to the clients of an instance, and hashes of theirs, for those that come or are needed again."""

import hashlib
from collections.abc import Iterable
from typing import Any

from isthmus_contracts.pb import secure_aggregation_pb2 as pb

from ..parameters import ClientId, Outgoing
from ..refusal import Reason, Refusal


class Correspondence:
    """The messages to and from a fixed set of clients."""

    def __init__(self, incarnation: int, clients: Iterable[ClientId]) -> None:
        self._incarnation = incarnation
        self.clients = frozenset(clients)
        self._sent: dict[ClientId, list[pb.SecureServerMessage]] = {who: [] for who in self.clients}
        self._heard: dict[tuple[ClientId, str], bytes] = {}

    def send(self, receivers: Iterable[ClientId], **step: Any) -> list[Outgoing]:
        """Make one message for all receivers: the same object, since a roster for a thousand clients is large."""
        message = pb.SecureServerMessage(incarnation=self._incarnation, **step)
        outs = [Outgoing(who, message) for who in sorted(receivers)]
        for out in outs:
            self._sent[out.who].append(message)
        return outs

    def sent(self, who: ClientId) -> list[Outgoing]:
        """Return all messages to a client so far."""
        return [Outgoing(who, message) for message in self._sent.get(who, [])]

    def is_repeated(self, who: ClientId, message: pb.SecureClientMessage) -> bool:
        """Return True if the client has sent this message before. Raises ``Refusal`` if it was a different one."""
        step = message.WhichOneof("step") or ""
        before = self._heard.get((who, step))
        # A client may refuse one instance for several reasons.
        if before is not None and before != _content(message) and step != "refusal":
            raise Refusal(Reason.CHANGED, f"{step} came a second time with another content")
        return before is not None

    def note(self, who: ClientId, message: pb.SecureClientMessage) -> None:
        """Note a message of a client."""
        self._heard[who, message.WhichOneof("step") or ""] = _content(message)


def _content(message: pb.SecureClientMessage) -> bytes:
    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()
