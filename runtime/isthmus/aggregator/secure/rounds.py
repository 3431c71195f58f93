"""Secure aggregation of a job's rounds: begins instances, fixes their survivors, and opens their sums."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa
from isthmus_contracts.pb.federation_pb2 import TensorSpec

from ...secure_aggregation.layout import wire_specs
from ...secure_aggregation.parameters import Participant, Phase
from ...secure_aggregation.server import ServerProtocol
from ...strategies import StrategyError, Update
from ...tensors import checksum_of
from ..clients.membership import Client, ClientId, Membership
from ..job import Job
from ..model.global_model import GlobalModel
from ..state.training_state import ActiveRound, TrainingState
from ..telemetry.round_statistics import RoundStatistics
from ..telemetry.secure_metrics import SecureMetrics
from .durable_state import DurableState
from .exclusions import Exclusions
from .instance import Instance
from .journal import Entry
from .lost_sums import consequence, require_possible
from .resources import for_hashing, threads
from .subject import Subject

log = logging.getLogger(__name__)

T = TypeVar("T")


class SecureRounds:
    """The instances of one job, one at a time.

    A round calls :meth:`prepare` and :meth:`start`, perhaps several times; then :meth:`freeze`; and once
    :attr:`settled`, :meth:`unmask` if it is :attr:`openable`, and else :meth:`fail`.
    """

    def __init__(
        self, job: Job, training: TrainingState, members: Membership, durable: DurableState, folder: Executor,
        statistics: RoundStatistics, metrics: SecureMetrics,
    ) -> None:  # fmt: skip
        """``folder``: the thread in which updates are added to sums."""
        settings = job.spec.privacy.secure_aggregation
        assert settings is not None
        self._job = job
        self._settings = settings
        self._training = training
        self._members = members
        self._durable = durable
        self._folder = folder
        self._statistics = statistics
        self._metrics = metrics
        self._subject: Subject | None = None
        self._arranged: tuple[int, str, object] | None = None
        self._base_digest = ""
        self._incarnation = 0
        self._reason = ""  # of the newest loss in the present round
        self._instance: Instance | None = None
        self._opened: Instance | None = None
        self._frozen = self._recovering = False
        self._excluded = Exclusions()
        self.layout = sa.SecureLayout()
        """Form of the present instance's updates."""
        self.specs: list[TensorSpec] = []
        """Specs of the present instance's updates."""
        self.awaited: frozenset[ClientId] = frozenset()
        """Clients of the instance that the end of an earlier process has interrupted."""
        self.attempt = 0
        """Number of times that clients have had to train the present round again."""
        self.note = ""
        """Why the present round is done again, in one line; empty if it is not."""
        self.status = pb.SecureStatus()
        """The newest instance that was opened, or that failed."""
        self.make_room: Callable[[], None] = lambda: None
        """Called before a sum is opened, to free memory that only the reception of updates needs."""

    # Questions of the intake and of the round's decisions.

    @property
    def incarnation(self) -> int:
        """Number of the present instance; 0 if there is none."""
        return self._instance.incarnation if self._instance is not None else 0

    @property
    def collecting(self) -> bool:
        """True while masked updates are taken."""
        return self._instance is not None and self._instance.collecting

    @property
    def settled(self) -> bool:
        """True once the present instance can be opened, or never can."""
        return self._instance is None or self._instance.settled

    @property
    def openable(self) -> bool:
        """True once the masks of the present instance can be removed."""
        return self._instance is not None and self._instance.protocol.phase is Phase.DONE

    @property
    def fewest(self) -> int:
        """Minimum number of clients with which an instance can begin."""
        return max(self._settings.min_clients, self._job.spec.min_updates)

    @property
    def needed(self) -> int:
        """Minimum number of updates in the present instance's sum."""
        return max(self.fewest, self._instance.protocol.threshold if self._instance is not None else 0)

    def shortage(self, contributors: Collection[ClientId]) -> str:
        """Return why the sum of these clients' updates could not be opened now; empty if it could."""
        if self._instance is None or not self._instance.collecting:
            return "its clients are still exchanging keys"
        return self._instance.protocol.shortage(contributors)

    @property
    def disputed(self) -> bool:
        """True while clients of the present instance refuse to go on, and others may still name the same culprit."""
        return self._instance is not None and self._instance.disputed

    def able(self) -> frozenset[ClientId]:
        """Return the clients whose update can be in the sum, whether it is already there or not."""
        return self._instance.able() if self._instance is not None else frozenset()

    def takes_from(self, client: ClientId) -> bool:
        """Return whether an update of the client can be added to the sum now."""
        return self._instance is not None and self._instance.takes_from(client)

    def takes_part(self, client: Client) -> bool:
        """Return whether a client's present process belongs to the present instance."""
        return self._instance is not None and self._instance.is_participant(client)

    def needs(self, client: Client) -> bool:
        """Return whether a client's present process still has a part in an instance that is not over."""
        return not self.settled and self.takes_part(client)

    def accept(self, update: Update) -> None:
        """Add a masked update to the sum."""
        assert self._subject is not None
        self._subject.accept(update)

    # Events of the clients' sessions.

    def receive(self, client: Client, message: sa.SecureClientMessage) -> None:
        """Handle a client's message."""
        if self._instance is not None:
            self._instance.receive(client, message)

    def joined(self, client: Client) -> None:
        """Repeat the instance's messages to a client that has connected."""
        if self._instance is not None:
            self._instance.joined(client)
        current = self._training.round
        if current is not None and not self.takes_part(client):
            self._excluded.pardon(current.rejected)

    def extended(self, current: ActiveRound) -> None:
        """Let the clients that a round has rejected try again, as its deadline is extended."""
        self._excluded.pardon_all(current.rejected)

    def lost(self) -> None:
        """Note that a client has disconnected or failed."""
        if self._instance is not None:
            self._instance.refresh()

    # Steps of a round.

    async def recover(self, model: GlobalModel, subject: Subject) -> ActiveRound | None:
        """Return the round on top of ``model`` whose survivors an earlier process had fixed, or ``None``.

        ``subject``: what the round sums. Whatever belongs to another round, or to another kind of sum, is removed.
        Raise :class:`StrategyError` if the round's sum was lost too often.
        """
        number = model.round + 1
        entry = await self._durable.open()
        if entry is None or not entry.is_of(self._job.uid, number, model.digest, subject.purpose):
            await self._durable.discard()
            return None
        require_possible(entry)
        self.attempt, self.awaited, self._reason = entry.attempt, frozenset(entry.participants), entry.reason
        if not entry.checksum:
            self.note = consequence(entry) if self.attempt else ""
            return None
        current = await self._in_folder(lambda: self._recovered(entry, model, subject))
        if current is None:
            # The survivors may have been announced, so these updates must not be in another sum.
            self._subject = subject
            await self._give_up(number, model, "its masked sum did not survive a crash")
            return None
        assert self._instance is not None
        log.info(
            "round %d: going on with instance %d, which has %d updates",
            number, self._instance.incarnation, len(entry.contributors),
        )  # fmt: skip
        return current

    def resume(self) -> None:
        """Let the instance of a recovered round go on. No effect on an instance of this process."""
        if self._instance is not None and self._recovering:
            self._recovering = False
            self._instance.resume()

    async def prepare(self, current: ActiveRound, subject: Subject) -> None:
        """Make a new instance possible. It ends the present one. Raise :class:`StrategyError`."""
        self._end("replaced")
        self._subject, base = subject, current.base
        if self._arranged != (arranged := (current.number, base.digest, subject)):
            self._base_digest, self.layout = await self._in_folder(
                lambda: (
                    subject.basis(current.number, for_hashing(base.checkpoint)),
                    subject.arrange(current.number, base.checkpoint.state),
                )
            )
            self.specs, self._arranged = wire_specs(self.layout), arranged
        self._incarnation = await self._durable.next_incarnation()
        await self._durable.keep(lambda: self._folder.submit(subject.begin, base.checkpoint.state).result())

    def start(self, current: ActiveRound, clients: Collection[Client]) -> None:
        """Begin an instance among clients, which have just been offered the work."""
        assert self._subject is not None
        begin = sa.SecureBegin(
            round=current.number, incarnation=self._incarnation, purpose=self._subject.purpose,
            base_digest=self._base_digest, layout=self.layout, phase_seconds=self._settings.phase_deadline_seconds,
            attempt=self.attempt,
        )  # fmt: skip
        participants = [Participant(*client.id, client.attempt, client.instance) for client in clients]
        protocol = ServerProtocol(
            self._job.uid, begin, participants, fewest=self._settings.min_clients, parties=self._settings.min_parties
        )
        self._instance, self._frozen = self._made(protocol, begin, participants), False
        self._durable.note(self._entry(current, participants=tuple(self._instance.participants)))
        log.info("round %d: instance %d of %d clients", current.number, begin.incarnation, len(participants))
        self._instance.start()

    async def freeze(self, current: ActiveRound) -> None:
        """Fix the survivors: the clients whose updates are in the sum. They are durable before a client learns them."""
        instance, subject = self._instance, self._subject
        assert instance is not None and subject is not None
        messages = instance.freeze(current.accepted)
        if instance.settled:
            return
        checksum = await self._in_folder(lambda: checksum_of(subject.accumulator))
        entry = self._entry(
            current, participants=tuple(instance.participants), contributors=tuple(sorted(current.accepted)),
            checksum=checksum, protocol=instance.protocol.journal(),
        )  # fmt: skip
        await self._durable.write(entry)
        self._frozen = True
        instance.announce(messages)

    async def unmask(self, current: ActiveRound) -> bool:
        """Remove the masks from the sum; return false if it is worthless, so that the round has to be done again.

        The file keeps the masked sum, so that nothing is lost if the process ends before the commit.
        """
        instance, subject = self._instance, self._subject
        assert instance is not None and subject is not None
        started = time.monotonic()
        self.make_room()  # the masks' removal, and later the rule, need the memory of a model beside the sum

        def opened() -> None:
            total = self._durable.accumulator.private(self.specs)
            subject.adopt(current.base.checkpoint.state, total, len(current.accepted))
            subject.unmask(instance.protocol.plan(), threads())

        try:
            await self._durable.keep(lambda: self._folder.submit(opened).result())
        except StrategyError as error:
            await self.fail(current, str(error))
            return False
        self._phase_over("open", time.monotonic() - started)
        self._end("opened")
        self._opened = instance
        survivors = len(current.accepted)
        current.sums = sums = replace(
            subject.opened, dropouts=len(instance.participants) - survivors, parties=instance.protocol.parties
        )
        self.status = pb.SecureStatus(
            round=current.number, survivors=survivors, dropouts=sums.dropouts, parties=sums.parties,
            clipped_ratio=sums.clipped_ratio, failed=self.status.failed,
        )  # fmt: skip
        self._metrics.opened(self.status)
        log.info(
            "round %d: opened the sum of %d updates (parties: %d, dropouts: %d, share of clipped coordinates: %.3g)",
            current.number, survivors, sums.parties, sums.dropouts, sums.clipped_ratio,
        )  # fmt: skip
        return True

    async def fail(self, current: ActiveRound, reason: str = "") -> None:
        """End an instance that cannot be opened: the round has to be done again. Raise :class:`StrategyError` if it
        cannot."""
        instance = self._instance
        assert instance is not None
        have, need = len(current.accepted), self.needed
        reason = reason or instance.protocol.failure or f"{have} of {need} needed clients have handed in"
        self._end("failed")
        if self._frozen:
            await self._give_up(current.number, current.base, reason)
        else:
            self._show(current.number, reason, f"round {current.number} is done again: {reason}")

    def end_round(self) -> None:
        """End the present instance, with the notes on its round, which is committed or abandoned."""
        self._end("replaced")
        if self._opened is not None:
            self._opened.say_farewell()
            self._opened = None
        self.attempt, self.note, self._reason = 0, "", ""
        self._excluded.clear()

    async def _give_up(self, number: int, model: GlobalModel, reason: str) -> None:
        """Note that the updates of a round may have been announced as parts of a sum, so that no other may have them.

        Raise :class:`StrategyError` if the round cannot be done again.
        """
        self.attempt, self._reason = self.attempt + 1, reason
        assert self._subject is not None
        entry = Entry(self._job.uid, number, model.digest, self._subject.purpose, self.attempt, reason=reason)
        await self._durable.write(entry)
        self._show(number, reason, consequence(entry))

    def _show(self, number: int, reason: str, note: str) -> None:
        self.status.round = number
        self.status.failed += 1
        self.status.message = reason
        self.note = note
        log.warning("%s", note)
        self._training.changes.notify()

    def _recovered(self, entry: Entry, model: GlobalModel, subject: Subject) -> ActiveRound | None:
        """Restore an instance and its sum; return its round, or ``None`` if they cannot be used."""
        try:
            protocol = ServerProtocol.restore(entry.protocol)
            begin = protocol.begin
            specs = wire_specs(begin.layout)
            accumulator = self._durable.accumulator.private(specs)
        except (DecodeError, ValueError, OSError) as error:
            log.warning("round %d: its instance cannot be restored: %s", entry.round, error)
            return None
        state = model.checkpoint.state
        # Memory of the file that was not yet written back is lost when the machine fails.
        if checksum_of(accumulator) != entry.checksum or subject.arrange(entry.round, state) != begin.layout:
            return None
        subject.adopt(state, accumulator, len(entry.contributors))
        self._subject, self.layout, self.specs = subject, begin.layout, specs
        self._base_digest, self._arranged = begin.base_digest, (entry.round, model.digest, subject)
        self._instance = self._made(protocol, begin, protocol.participants)
        self._frozen = self._recovering = True
        now = time.monotonic()
        current = ActiveRound(entry.round, now, now, base=model)
        current.selected.update(self._instance.participants)
        current.accepted.update(entry.contributors)
        return current

    def _made(self, protocol: ServerProtocol, begin: sa.SecureBegin, participants: Collection[Participant]) -> Instance:
        return Instance(
            protocol, begin, participants, self._members, self._training.changes.notify, self._on_fault, self._on_drop,
            lambda phase, seconds: self._phase_over(phase.name.lower(), seconds),
        )  # fmt: skip

    def _entry(self, current: ActiveRound, **fields: Any) -> Entry:
        assert self._subject is not None
        return Entry(
            self._job.uid, current.number, current.base.digest, self._subject.purpose, self.attempt,
            reason=self._reason, **fields,
        )  # fmt: skip

    def _end(self, outcome: str) -> None:
        """End the present instance, unless it is over, and count it."""
        if self._instance is not None:
            self._metrics.ended(outcome)
            self._instance.close()
            self._instance = None

    def _on_fault(self, client: ClientId, reason: str, text: str) -> None:
        """Note that a client was dropped from the instance. Those that object to a culprit can take part in another."""
        name = f"{client[0]}/{client[1]}"
        log.warning("%s is dropped from secure aggregation (%s): %s", name, reason, text)
        self._metrics.fault(reason)
        current = self._training.round
        if current is not None and self._instance is not None:
            protocol = self._instance.protocol
            current.rejected.add(client)
            current.fault = f"{name}: {text}"
            self._excluded.add(client, culprit=client in protocol.culprits)
            self._excluded.pardon(current.rejected, protocol.objectors)

    def _on_drop(self, client: ClientId, reason: str, text: str) -> None:
        """Note that the instance goes on without a client."""
        log.info("%s/%d is left out of secure aggregation: %s", *client, text)
        self._metrics.fault(reason)

    def _phase_over(self, phase: str, seconds: float) -> None:
        self._metrics.phase(phase, seconds)
        self._statistics.phase(phase, seconds)

    async def _in_folder(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._folder, work)
