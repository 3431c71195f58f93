"""One instance of secure aggregation on the event loop: its messages, the deadlines of its phases, and lost clients.

The decisions are those of :class:`~....secure_aggregation.server.ServerProtocol`, which this module carries out.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Set

from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa
from isthmus_contracts.text import one_line

from ...secure_aggregation.parameters import Outgoing, Participant, Phase
from ...secure_aggregation.server import ServerProtocol
from ..clients.membership import Client, ClientId, Membership
from ..state.round_decision import LOST_CLIENT_GRACE

log = logging.getLogger(__name__)

LOST, LATE = "lost", "late"
"""Reasons of drops that are no faults: the process or its connection has ended; the phase's deadline was missed."""
_SETTLED = frozenset({Phase.DONE, Phase.FAILED})

OnFault = Callable[[ClientId, str, str], None]
"""Called with a client, a reason in one word, and one line of details."""


class Instance:
    """An instance in progress. ``changed`` is called after each step."""

    def __init__(
        self, protocol: ServerProtocol, begin: sa.SecureBegin, participants: Collection[Participant],
        members: Membership, changed: Callable[[], None], on_fault: OnFault, on_drop: OnFault,
        on_phase: Callable[[Phase, float], None],
    ) -> None:  # fmt: skip
        """``on_fault``: for a client that breaks the protocol or refuses to go on. ``on_drop``: for one that is lost or
        late. ``on_phase``: called with a phase that is over and its seconds."""
        self.protocol = protocol
        self.begin = begin
        self.participants: Mapping[ClientId, Participant] = {each.id: each for each in participants}
        self._members = members
        self._changed = changed
        self._on_fault = on_fault
        self._on_drop = on_drop
        self._on_phase = on_phase
        self._phase = protocol.phase
        self._created = self._entered = time.monotonic()
        self._deadline = self._entered + begin.phase_seconds
        self._faults = 0
        self._holds = False
        self._farewells: list[Outgoing] = []
        self._possible: Set[ClientId] = frozenset(self.participants)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def incarnation(self) -> int:
        return self.begin.incarnation

    @property
    def settled(self) -> bool:
        """True once the sum can be opened, or never can."""
        return self.protocol.phase in _SETTLED

    @property
    def collecting(self) -> bool:
        """True while masked updates are taken."""
        return self.protocol.phase is Phase.COLLECT

    @property
    def disputed(self) -> bool:
        """True if clients were dropped for faults or refusals in a phase before updates are taken, which goes on."""
        return bool(self.protocol.faults) and self.protocol.phase < Phase.COLLECT

    def start(self) -> None:
        """Send the first messages."""
        self._send(self.protocol.start())
        self._advance()

    def resume(self) -> None:
        """Go on with a restored instance: repeat its messages to the clients that are connected, and set the timer.

        The others need a moment to reconnect to the new process, even if the phase has a short deadline.
        """
        self._deadline = time.monotonic() + max(self.begin.phase_seconds, LOST_CLIENT_GRACE)
        for client in self._members:
            self.joined(client)
        self._advance()

    def able(self) -> frozenset[ClientId]:
        """Return the clients whose update can still be in the sum, whether it is already there or not."""
        if self.settled:
            return frozenset()
        return frozenset(client for client in self._possible if not self._is_gone(client))

    def takes_from(self, client: ClientId) -> bool:
        """Return whether an update of the client can be added to the sum now."""
        return self.collecting and client in self._possible and not self._is_gone(client)

    def is_participant(self, client: Client) -> bool:
        """Return whether a client's present process takes part."""
        own = self.participants.get(client.id)
        return own is not None and (own.attempt, own.instance) == (client.attempt, client.instance)

    def receive(self, client: Client, message: sa.SecureClientMessage) -> None:
        """Handle a client's message. Messages of other instances, and of other processes, are ignored."""
        if message.incarnation == self.incarnation and self.is_participant(client):
            self._take(self.protocol.receive(client.id, message))

    def joined(self, client: Client) -> None:
        """Repeat the messages to a client that has connected again, or drop the process that it has replaced."""
        if self.is_participant(client):
            if not self._holds:  # it then gets what is announced
                self._send(self.protocol.resend(client.id))
        elif client.id in self.participants and not self.settled:
            self._take(self.protocol.drop(client.id, "a newer process has taken over"))

    def refresh(self) -> None:
        """Note that a client was lost or has failed."""
        self._advance()

    def freeze(self, contributors: Iterable[ClientId]) -> list[Outgoing]:
        """Fix the survivors; return the messages to :meth:`announce` once the instance's state is durable."""
        self._holds = True
        return self.protocol.freeze(contributors)

    def announce(self, messages: Iterable[Outgoing]) -> None:
        """Send the messages of :meth:`freeze`."""
        self._holds = False
        self._take(messages)

    def say_farewell(self) -> None:
        """Tell the clients that the sum is open.

        They then forget the instance, so it must not be needed any more, not even after the end of this process.
        """
        farewells, self._farewells = self._farewells, []
        self._deliver(farewells)

    def close(self) -> None:
        """Stop the timer. The instance must not be used afterwards."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _take(self, messages: Iterable[Outgoing]) -> None:
        self._send(messages)
        # With many clients, nothing here may be done for all of them at each message.
        if self.protocol.phase is not self._phase:
            self._advance()
        elif len(self.protocol.faults) > self._faults:
            self._report()
            self._changed()

    def _send(self, messages: Iterable[Outgoing]) -> None:
        """Send messages, but keep those that announce an open sum for :meth:`say_farewell`."""
        now: list[Outgoing] = []
        for message in messages:
            is_farewell = message.message.HasField("end") and self.protocol.phase is Phase.DONE
            (self._farewells if is_farewell else now).append(message)
        self._deliver(now)

    def _deliver(self, messages: Iterable[Outgoing]) -> None:
        # Most messages are the same object for all clients. Wrapping copies it, once.
        wrapped: dict[int, pb.ServerMessage] = {}
        for message in messages:
            client = self._members.get(message.who)
            if client is None or not self.is_participant(client):
                continue
            key = id(message.message)
            if key not in wrapped:
                wrapped[key] = pb.ServerMessage(secure=message.message)
            client.send(wrapped[key])

    def _advance(self) -> None:
        """Drop lost clients that a phase waits for, report what has happened, and set the timer for what may."""
        while lost := self._lost():
            for client_id, text in lost:
                self._on_drop(client_id, LOST, text)
                self._send(self.protocol.drop(client_id, text))
        self._possible = self.protocol.contributors_possible if self.collecting else self.participants.keys()
        self._report()
        self._set_timer()
        self._changed()

    def _lost(self) -> list[tuple[ClientId, str]]:
        now = time.monotonic()
        found = []
        for client_id in self._awaited():
            if self._is_gone(client_id):
                found.append((client_id, "its process has ended"))
            elif now >= self._lost_until(client_id):
                found.append((client_id, "its connection is lost"))
        return found

    def _awaited(self) -> Set[ClientId]:
        """Return the clients whose answer the present phase waits for. Updates have no deadline here."""
        return frozenset() if self.settled or self.collecting else self.protocol.waiting_for

    def _is_gone(self, client_id: ClientId) -> bool:
        """Return whether the process that takes part has ended: it has failed, or a newer one has connected."""
        client = self._members.get(client_id)
        return client is not None and (client.failed or not self.is_participant(client))

    def _lost_until(self, client_id: ClientId) -> float:
        """Return when a client that is not connected is given up (monotonic seconds); infinity for a connected one."""
        client = self._members.get(client_id)
        if client is not None and client.connected:
            return float("inf")
        # A restarted aggregator has not seen the client yet.
        since = self._created if client is None else client.lost_at
        return since + LOST_CLIENT_GRACE

    def _report(self) -> None:
        protocol, now = self.protocol, time.monotonic()
        for client_id, reason, text in protocol.faults[self._faults :]:
            self._on_fault(client_id, reason, one_line(text))
        self._faults = len(protocol.faults)
        if protocol.phase is not self._phase:
            self._on_phase(self._phase, now - self._entered)
            self._phase, self._entered = protocol.phase, now
            self._deadline = now + self.begin.phase_seconds
            log.debug("instance %d: %s", self.incarnation, protocol.phase.name)

    def _set_timer(self) -> None:
        self.close()
        waiting = self._awaited()
        if not waiting:
            return
        due = min([self._deadline, *(self._lost_until(client) for client in waiting)])
        delay = max(due - time.monotonic(), 0.0) + 0.001
        self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if (late := self._awaited()) and time.monotonic() >= self._deadline:
            for client_id in sorted(late):
                self._on_drop(client_id, LATE, f"no answer in the phase {self.protocol.phase.name.lower()} in time")
            self._send(self.protocol.deadline())
        self._advance()
