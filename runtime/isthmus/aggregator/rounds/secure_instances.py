"""Steps that secure aggregation adds to a round: its instances, from the offers to the opened sum."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection
from dataclasses import replace

from ..clients.membership import Client, ClientId, Membership
from ..model.global_model import GlobalModel
from ..secure.rounds import SecureRounds
from ..secure.subject import Subject
from ..state.round_decision import LOST_CLIENT_GRACE, Decision, Verdict, decide
from ..state.training_state import ActiveRound, TrainingState
from ..telemetry.round_statistics import RoundStatistics
from .evaluation import WaitForChange
from .offers import Offers

log = logging.getLogger(__name__)

# Longest wait for processes that take over from older ones, which look for the round's end five times a second.
_HANDOVER_SECONDS = 1.0


class SecureInstances:
    """Runner of instances for one kind of sum."""

    def __init__(
        self, training: TrainingState, members: Membership, secure: SecureRounds, subject: Subject, offers: Offers,
        statistics: RoundStatistics, offer: Callable[[Client, ActiveRound], None],
    ) -> None:  # fmt: skip
        """``offer``: offers a client the work of a round."""
        self._training = training
        self._members = members
        self._secure = secure
        self._subject = subject
        self._offers = offers
        self._statistics = statistics
        self._offer = offer
        self._begun: frozenset[tuple[ClientId, int, str]] = frozenset()
        self._begun_at = 0.0

    async def begin(self, current: ActiveRound, candidates: Callable[[], Collection[Client]]) -> None:
        """Begin an instance of a round, in place of the present one; updates that count for that one are forgotten.

        ``candidates``: returns the clients that can take part, and is called at the last moment. Raises
        :class:`StrategyError` if the model has no layout.
        """
        current.closing = True  # nothing may be added to a sum that is about to be overwritten
        if current.folding:
            await asyncio.wait(current.folding.values())
        current.restart()
        self._statistics.withdraw_all()
        await self._secure.prepare(current, self._subject)
        await self._handed_over()
        current.closing = False
        clients = candidates()
        current.selected.update(client.id for client in clients)
        self._offers.begin_round()
        for client in clients:
            self._offer(client, current)
        self._begun, self._begun_at = _processes(clients), time.monotonic()
        self._secure.start(current, clients)
        self._training.changes.notify()

    async def _handed_over(self) -> None:
        """Wait until newer processes have replaced those that they wait for, which takes a moment at a round's end."""
        until = time.monotonic() + _HANDOVER_SECONDS
        while any(client.successors for client in self._members) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(_HANDOVER_SECONDS / 20)

    @property
    def fewest(self) -> int:
        """Minimum number of clients with which an instance can begin."""
        return self._secure.fewest

    @property
    def needed(self) -> int:
        """Minimum number of updates in the present instance's sum."""
        return self._secure.needed

    @property
    def failed_openings(self) -> int:
        """Number of sums of the round that were announced, or even opened, and that no model came of."""
        return self._secure.attempt

    @property
    def note(self) -> str:
        """Why the round is done again, in one line; empty if it is not."""
        return self._secure.note

    def end_round(self) -> None:
        """End the round's instance."""
        self._secure.end_round()

    def extended(self, current: ActiveRound) -> None:
        """Let the clients that a round has rejected try again, as its deadline is extended, but for culprits."""
        self._secure.extended(current)

    def decide(self, current: ActiveRound, now: float) -> Decision:
        """Return the next step of a round, whose updates must suffice to open the sum. ``now``: monotonic seconds."""
        current.able = self._secure.able()
        decision = decide(current, self._members.by_id, self._secure.needed, now)
        if decision.verdict is Verdict.COMMIT and self._secure.shortage(current.accepted):
            decision = decide(current, self._members.by_id, current.updates + 1, now)
        if decision.verdict in (Verdict.SELECT_MORE, Verdict.EXTEND) and self._secure.disputed:
            # Who is at fault is known once all have answered; an instance without it can begin then.
            return Decision(Verdict.WAIT, math.inf)
        if decision.verdict is Verdict.SELECT_MORE and now < self.next_try:
            return replace(decision, recheck_at=min(decision.recheck_at, self.next_try))
        return decision

    def can_begin(self, clients: Collection[Client]) -> bool:
        """Return whether another instance among clients may succeed. The same processes would fail in the same way."""
        again = _processes(clients) == self._begun and time.monotonic() < self.next_try
        return len(clients) >= self._secure.fewest and not again

    @property
    def next_try(self) -> float:
        """Time from which the processes of the present instance may begin another one (monotonic seconds)."""
        return self._begun_at + LOST_CLIENT_GRACE

    async def recovered(self, base: GlobalModel, changed: WaitForChange) -> ActiveRound | None:
        """Return the round on top of ``base`` whose survivors an earlier process had fixed, or ``None``.

        If that process ended before, wait for the clients of its instance: until all are back, for a limited time.
        """
        current = await self._secure.recover(base, self._subject)
        if current is not None:
            return current
        awaited, until = self._secure.awaited, time.monotonic() + LOST_CLIENT_GRACE
        while time.monotonic() < until and (away := awaited - {client.id for client in self._members.ready()}):
            self._training.waiting = f"{len(away)} of {len(awaited)} clients of the interrupted round are not back yet"
            await changed(until=until)
        self._training.waiting = ""
        return None

    async def open(self, current: ActiveRound, changed: WaitForChange) -> bool:
        """Fix the survivors and open the sum; return whether that succeeded."""
        await self._secure.freeze(current)
        return await self.settle(current, changed)

    async def settle(self, current: ActiveRound, changed: WaitForChange) -> bool:
        """Open the sum once the clients have sent what that takes; return whether they have."""
        self._secure.resume()
        while not self._secure.settled:
            await changed()
        if not self._secure.openable:
            await self._secure.fail(current)
            return False
        return await self._secure.unmask(current)


def _processes(clients: Collection[Client]) -> frozenset[tuple[ClientId, int, str]]:
    return frozenset((client.id, client.attempt, client.instance) for client in clients)
