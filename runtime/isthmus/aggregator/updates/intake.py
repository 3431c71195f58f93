"""Intake of updates: decides which are wanted, and counts each once."""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb.federation_pb2 import TensorSpec

from ...strategies import Strategy, StrategyError, Update
from ...tensors import State
from ...views import views_of
from ..clients.client_history import ClientHistory, Report
from ..clients.membership import ClientId, Membership
from ..job import Job
from ..model import messages
from ..model.compression import Compression
from ..model.global_model import GlobalModel
from ..secure.rounds import SecureRounds
from ..state.round_decision import UpdateKey
from ..state.training_state import UPDATE, ActiveRound, Contribution, TrainingState
from ..telemetry.round_statistics import RoundStatistics
from . import masked, validation
from .base_models import BaseModels, rebase
from .permissions import Permissions
from .receive_slots import ReceiveSlots
from .validation import Fault, Reason, StorageError

log = logging.getLogger(__name__)


class Intake:
    """Decision on pushed updates, with the reply to each.

    An accepted update is folded (added to the round's result by the strategy) before it is answered. Large updates are
    folded one at a time, in the thread of ``folder``.
    """

    def __init__(
        self, job: Job, training: TrainingState, members: Membership, compression: Compression, strategy: Strategy,
        statistics: RoundStatistics, folder: Executor, directory: Path | None = None,
        secure: SecureRounds | None = None,
    ) -> None:  # fmt: skip
        """``directory``: where to receive updates that would take too much memory. ``secure``: if they are masked."""
        self._spec = job.spec
        self._training = training
        self._members = members
        self._compression = compression
        self._strategy = strategy
        self._secure = secure
        self._statistics = statistics
        self._folder = folder
        self._folds_late = job.spec.folds_late
        self._directory = directory
        self._is_private = job.spec.privacy.differential_privacy is not None
        self.permissions = Permissions(job.uid, job.spec, members, training)
        self.base_models = BaseModels(job.spec.stragglers.max_staleness + 1 if self._folds_late else 1)
        self.client_history = ClientHistory()
        """Covers the committed rounds."""
        self.receive_slots = ReceiveSlots(directory, self._specs)

    def _specs(self, model: GlobalModel) -> Sequence[TensorSpec]:
        """Return the specs of updates from a model."""
        return model.specs if self._secure is None else self._secure.specs

    def early_reply(self, header: pb.UpdateHeader) -> pb.PushReply | None:
        """Return the reply to an update that does not count, before it is received; ``None`` if it is to be received.

        :meth:`accept` decides again afterwards.
        """
        found = self._admit(header)
        return found if isinstance(found, pb.PushReply) else None

    def _admit(self, header: pb.UpdateHeader) -> pb.PushReply | ActiveRound | None:
        """Return the round in which an update counts, ``None`` for initial weights, or the reply if it does not."""
        if (reply := self.permissions.check_update(header)) is not None:
            return reply
        client_id = (header.pool, header.index)
        return self._admit_to_round(client_id, header) if header.round else self._admit_initial(client_id, header)

    def _admit_initial(self, client_id: ClientId, header: pb.UpdateHeader) -> pb.PushReply | None:
        if self._training.model is not None or self._training.initial is not None:
            return messages.reply(pb.PushReply.ACCEPTED, "the model has its initial weights")
        if not self.permissions.may_initialize(client_id):
            message = "this client was not asked for initial weights"
            return validation.reply(pb.PushReply.STALE, message, Reason.NOT_SELECTED)
        if (fault := validation.examine_initial(header, self._directory)) is not None:
            return self.reject(header, fault)
        self._training.initialization.begun(client_id)
        return None

    def _admit_to_round(self, client_id: ClientId, header: pb.UpdateHeader) -> pb.PushReply | ActiveRound:
        current = self._training.round
        if self._folds_late and header.round in self.client_history.of(client_id).counted:
            return messages.reply(pb.PushReply.ACCEPTED, "counted before", self._training.completed)
        if current is None or header.round > current.number:
            return validation.reply(pb.PushReply.STALE, f"round {header.round} is not in progress")
        if header.round < current.number:
            reply = self._reply_to_late(client_id, header, current)
        else:
            reply = self._reply_to_current(client_id, header, current)
        if reply is not None:
            return reply
        if current.closing:
            return validation.reply(pb.PushReply.CLOSED, f"round {current.number} has ended without it")
        if self._secure is None:
            fault = validation.examine(header, current.base, self._compression, self._strategy)
        else:
            fault = masked.examine(header, self._secure.specs)
        return self.reject(header, fault) if fault else current

    def _reply_to_current(
        self, client_id: ClientId, header: pb.UpdateHeader, current: ActiveRound
    ) -> pb.PushReply | None:
        if header.base_digest != current.base.digest:
            return validation.reply(pb.PushReply.STALE, "it was trained from another model than this round's")
        if not self.permissions.was_offered(header, self.client_history):
            return self._not_selected(header)
        secure = self._secure
        if secure is not None and not current.closing:
            reply = masked.answer(header, secure.incarnation, takes=secure.takes_from(client_id))
            if reply is not None:
                return reply
        if client_id in current.accepted:
            return messages.reply(pb.PushReply.ACCEPTED, "counted before", current.number)
        return None

    def _reply_to_late(self, client_id: ClientId, header: pb.UpdateHeader, current: ActiveRound) -> pb.PushReply | None:
        if not self._folds_late:
            return validation.reply(pb.PushReply.STALE, f"round {header.round} is over")
        if (client_id, header.round) in current.late:
            return messages.reply(pb.PushReply.ACCEPTED, "counted before", current.number)
        if current.number - header.round > self._spec.stragglers.max_staleness:
            return validation.reply(
                pb.PushReply.STALE, f"round {header.round} is over for more than stragglers.maxStaleness rounds"
            )
        if not self.permissions.was_offered(header, self.client_history):
            return self._not_selected(header)
        if self.base(header) is None:
            return validation.reply(pb.PushReply.STALE, "the model that it was trained from is not known")
        return None

    def _not_selected(self, header: pb.UpdateHeader) -> pb.PushReply:
        message = f"the client is not in round {header.round}"
        return validation.reply(pb.PushReply.STALE, message, Reason.NOT_SELECTED)

    def base(self, header: pb.UpdateHeader) -> State | None:
        """Return the model that an update was trained from, if it is the current one or a recent one."""
        return self.base_models.find(header.round - 1, header.base_digest)

    def is_current(self, header: pb.UpdateHeader) -> bool:
        """Return whether the model that an update was trained from is still in use.

        This is cheap, because it is called for each message.
        """
        return self.base(header) is not None if header.round else self._training.model is None

    async def wait_until_decidable(self, header: pb.UpdateHeader) -> None:
        """Wait until the reply to an update is certain.

        The reply is uncertain between two rounds and after a restart (late updates may count in the next round), and
        while an earlier copy of the update is being folded.
        """
        waits = self._training.phase in (pb.FederationStatus.TRAINING, pb.FederationStatus.WAITING)
        if self._folds_late and self._training.model is not None and waits:
            await self._training.open.wait()
        current = self._training.round
        if current is not None and (folding := current.folding.get(_key(header))) is not None:
            await asyncio.wait([folding])

    async def refuse(self, header: pb.UpdateHeader, fault: Fault) -> pb.PushReply:
        """Return the reply to a received update that cannot be decoded, once that reply is certain."""
        await self.wait_until_decidable(header)
        return self.early_reply(header) or self.reject(header, fault)

    async def accept(self, header: pb.UpdateHeader, tensors: State) -> pb.PushReply:
        """Check a received update, count it once, and return the reply. Raise :class:`StorageError`."""
        fault = await self._examine_values(header, tensors)
        await self.wait_until_decidable(header)
        current = self._admit(header)  # again: the state may have changed while the update was received
        if isinstance(current, pb.PushReply):
            return current
        if fault is not None:
            return self.reject(header, fault)
        if current is None:
            return self._accept_initial(header, tensors)
        update = self._update(header, tensors, current.number - header.round)
        # No await between _count and the submission: each counted update is folded before the result is computed.
        self._count(header, current)
        base = self.base(header) if header.round < current.number else None
        if self._training.is_small:
            problem = self._fold(header, update, current, base)
            self._after_fold(header, current, problem)
        else:
            folding = asyncio.get_running_loop().run_in_executor(
                self._folder, self._fold, header, update, current, base
            )
            current.folding[_key(header)] = folding

            def over(done: "asyncio.Future[OSError | StrategyError | None]") -> None:
                del current.folding[_key(header)]
                self._after_fold(header, current, None if done.cancelled() else done.exception() or done.result())

            folding.add_done_callback(over)
            # A client that disconnects cancels its call, but not the folding.
            problem = await asyncio.shield(folding)
        if self._training.broken is not None:
            return validation.reply(pb.PushReply.STALE, str(self._training.broken))
        if isinstance(problem, OSError):
            raise StorageError(_storage_fault(problem))
        return messages.reply(pb.PushReply.ACCEPTED, "", current.number)

    def _accept_initial(self, header: pb.UpdateHeader, weights: State) -> pb.PushReply:
        self._training.initial, self._training.buffers = weights, frozenset(header.buffers)
        self._training.frozen = frozenset(header.frozen)
        self._training.views = views_of(header.views)
        self._training.changes.notify()
        return messages.reply(pb.PushReply.ACCEPTED, "")

    async def _examine_values(self, header: pb.UpdateHeader, tensors: State) -> Fault | None:
        if self._secure is not None and header.round:
            return None  # a mask makes every value as likely as any other

        def examine() -> Fault | None:
            fault = validation.examine_values(tensors)
            if fault is not None or not self._is_private or not self._training.frozen:
                return fault
            base = self.base(header)
            return validation.examine_frozen(tensors, base, self._training.frozen) if base is not None else None

        return examine() if self._training.is_small else await asyncio.to_thread(examine)

    def _update(self, header: pb.UpdateHeader, tensors: State, staleness: int) -> Update:
        discount = self._spec.stragglers.weight(staleness) if staleness else 1.0
        name, scalars = f"{header.pool}/{header.index}", dict(header.scalars)
        # Tensors that no client trains need no noise.
        buffers = self._training.buffers | self._training.frozen if self._is_private else self._training.buffers
        return Update(name, header.num_examples, tensors, buffers, scalars, discount)

    def _count(self, header: pb.UpdateHeader, current: ActiveRound) -> None:
        client_id = (header.pool, header.index)
        if header.round < current.number:
            current.late.add((client_id, header.round))
        else:
            current.accepted.add(client_id)
            current.rejected.discard(client_id)
        client = self._members.get(client_id)
        seconds = client.since_offer(header.round, time.monotonic()) if client is not None else 0.0
        loss = header.metrics.get("loss", math.nan)
        report = Report(header.round, header.num_examples, loss if math.isfinite(loss) else None, seconds)
        current.reports.append((client_id, report))
        current.contributions[_key(header)] = Contribution(header.num_examples, dict(header.metrics))
        self._statistics.submitted(header, current.number - header.round)

    def _after_fold(self, header: pb.UpdateHeader, current: ActiveRound, problem: BaseException | None) -> None:
        """Note the outcome of a fold. If the update could not be kept, undo :meth:`_count`."""
        self._training.changes.notify()
        if isinstance(problem, StrategyError):
            self._training.broken = problem
        if not isinstance(problem, OSError):
            self._training.storage_faults.pop(UPDATE, None)
            return
        self._training.storage_faults[UPDATE] = _storage_fault(problem)
        client_id, key = (header.pool, header.index), _key(header)
        if header.round < current.number:
            current.late.discard(key)
        else:
            current.accepted.discard(client_id)
        current.reports[:] = [entry for entry in current.reports if (entry[0], entry[1].round) != key]
        del current.contributions[key]
        self._statistics.withdrawn(header)

    def _fold(
        self, header: pb.UpdateHeader, update: Update, current: ActiveRound, base: State | None
    ) -> OSError | StrategyError | None:
        """Fold an update, in any thread; return the error that prevented it. ``base``: base model of a late update."""
        started = time.monotonic()
        try:
            if base is not None:
                new_base = current.base.checkpoint.state
                rebase(update.tensors, base, new_base, update.buffers, self._strategy.rebases)
            (self._strategy if self._secure is None else self._secure).accept(update)
        except (OSError, StrategyError) as error:
            return error
        except Exception as error:
            # The sum may contain half of the update, so it cannot be used any more.
            log.exception("%s: the strategy failed", update.client)
            return StrategyError(
                f"the strategy failed on the update of {update.client}: {type(error).__name__}: {error};"
                " see the aggregator's log"
            )
        self._statistics.folded(header.pool, time.monotonic() - started)
        self.receive_slots.give_back(update.tensors)
        return None

    def reject(self, header: pb.UpdateHeader, fault: Fault) -> pb.PushReply:
        """Refuse an update for good. The round no longer waits for its client."""
        current = self._training.round
        if current is not None and header.round == current.number:
            client = (header.pool, header.index)
            if client not in current.rejected and fault.reason in (Reason.NON_FINITE, Reason.RANGE):
                current.diverged[client] += 1
            current.rejected.add(client)
            current.fault = f"{header.pool}/{header.index}: {fault}"
            self._training.changes.notify()
        if header.round == 0:
            self._training.initialization.refused((header.pool, header.index))
            message = f"the initial weights of {header.pool}/{header.index} were refused: {fault}"
            self._training.initial_fault = message
            self._training.changes.notify()
        log.warning("%s/%d: update of round %d refused: %s", header.pool, header.index, header.round, fault)
        return validation.reply(pb.PushReply.INVALID, fault.message, fault.reason)


def _storage_fault(error: OSError) -> str:
    # Some strategies keep updates on disk. The client sends the update again.
    return f"an update cannot be kept: {error.strerror or error}; trying again"


def _key(header: pb.UpdateHeader) -> UpdateKey:
    return (header.pool, header.index), header.round
