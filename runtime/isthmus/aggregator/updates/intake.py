"""Updates: which are wanted, and how each is counted once."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import TypeVar

from isthmus_contracts.pb import federation_pb2 as pb

from ...strategies import Strategy, StrategyError, Update
from ...tensors import State
from ...views import views_of
from ..clients.client_history import ClientHistory, Report
from ..clients.membership import ClientId, Membership
from ..job import Job
from ..model import messages
from ..model.compression import Compression
from ..state.round_decision import RoundState
from ..state.training_state import TrainingState
from ..telemetry.round_statistics import RoundStatistics
from . import validation
from .base_models import BaseModels, rebase
from .permissions import Permissions
from .receive_slots import ReceiveSlots
from .validation import Fault, Reason, StorageError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Intake:
    """Answers pushes. What it accepts has been folded, or waits for it in ``folder``, when it answers."""

    def __init__(
        self, job: Job, training: TrainingState, members: Membership, compression: Compression, strategy: Strategy,
        statistics: RoundStatistics, folder: Executor, directory: Path | None = None,
    ) -> None:  # fmt: skip
        """``directory``: where updates are received that would take too much memory."""
        self._spec = job.spec
        self._training = training
        self._members = members
        self._compression = compression
        self._strategy = strategy
        self._statistics = statistics
        self._folder = folder
        self._folds_late = job.spec.folds_late
        self._directory = directory
        self._is_private = job.spec.privacy.differential_privacy is not None
        self.permissions = Permissions(job.uid, job.spec, members, training)
        self.base_models = BaseModels(job.spec.stragglers.max_staleness + 1 if self._folds_late else 1)
        self.client_history = ClientHistory()
        """Of the committed rounds."""
        self.receive_slots = ReceiveSlots(directory)

    def early_reply(self, header: pb.UpdateHeader) -> pb.PushReply | None:
        """The answer to an update that need not even be received; ``None`` where it is wanted."""
        if (answer := self.permissions.check_update(header)) is not None:
            return answer
        client_id = (header.pool, header.index)
        if header.round == 0:
            return self._early_reply_initial(client_id, header)
        if (answer := self._early_reply_round(header, client_id)) is not None:
            return answer
        assert self._training.model is not None and self._training.round is not None
        if self._training.closing:
            return validation.reply(pb.PushReply.CLOSED, f"round {self._training.round.number} has ended without it")
        fault = validation.examine(header, self._training.model, self._compression, self._strategy)
        return self.reject(header, fault) if fault else None

    def _early_reply_initial(self, client_id: ClientId, header: pb.UpdateHeader) -> pb.PushReply | None:
        if self._training.model is not None or self._training.initial is not None:
            return messages.reply(pb.PushReply.ACCEPTED, "the model has its initial weights")
        if not self.permissions.may_initialize(client_id):
            message = "nobody asked this client for initial weights"
            return validation.reply(pb.PushReply.STALE, message, Reason.NOT_SELECTED)
        if (fault := validation.examine_initial(header, self._directory)) is not None:
            return self.reject(header, fault)
        self._training.initialization.begun(client_id)
        return None

    def _early_reply_round(self, header: pb.UpdateHeader, client_id: ClientId) -> pb.PushReply | None:
        """The answer to an update whose round, or whose turn, is not now."""
        state, model = self._training.round, self._training.model
        if self._folds_late and header.round in self.client_history.of(client_id).counted:
            return messages.reply(pb.PushReply.ACCEPTED, "counted before", self._training.completed)
        if state is None or model is None or header.round > state.number:
            return validation.reply(pb.PushReply.STALE, f"round {header.round} is not in progress")
        if header.round < state.number:
            return self._early_reply_late(header, client_id, state)
        if header.base_digest != model.digest:
            return validation.reply(pb.PushReply.STALE, "it was trained from another model than this round's")
        if not self.permissions.was_offered(header, self.client_history):
            return self._not_selected(header)
        if client_id in state.accepted:
            return messages.reply(pb.PushReply.ACCEPTED, "counted before", state.number)
        return None

    def _early_reply_late(self, header: pb.UpdateHeader, client_id: ClientId, state: RoundState) -> pb.PushReply | None:
        if not self._folds_late:
            return validation.reply(pb.PushReply.STALE, f"round {header.round} is over")
        if (client_id, header.round) in state.late:
            return messages.reply(pb.PushReply.ACCEPTED, "counted before", state.number)
        if state.number - header.round > self._spec.stragglers.max_staleness:
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
        """The model that an update was trained from, if it is the present one or a recent one."""
        return self.base_models.find(header.round - 1, header.base_digest)

    async def wait_until_decidable(self, header: pb.UpdateHeader) -> None:
        """Waits while an update's answer is not certain: between two rounds, and after a restart, where one that comes
        then counts in the next one; and while the same one, sent before, is being folded."""
        waits = self._training.phase in (pb.FederationStatus.TRAINING, pb.FederationStatus.WAITING)
        if self._folds_late and self._training.model is not None and waits:
            await self._training.open.wait()
        state = self._training.round
        if state is not None and (folding := state.folding.get(_key(header))) is not None:
            await asyncio.wait([folding])

    async def accept(self, header: pb.UpdateHeader, tensors: State) -> pb.PushReply:
        """Takes a complete update: checks its values, then counts it once."""
        bad = await self._in_thread(lambda state: self._examine_values(header, state), tensors)
        await self.wait_until_decidable(header)
        if (reply := self.early_reply(header)) is not None:  # the world may have moved on meanwhile
            return reply
        if bad is not None:
            return self.reject(header, bad)
        if header.round == 0:
            self._training.initial, self._training.buffers = tensors, frozenset(header.buffers)
            self._training.frozen = frozenset(header.frozen)
            self._training.views = views_of(header.views)
            self._training.changes.notify()
            return messages.reply(pb.PushReply.ACCEPTED, "")
        state = self._training.round
        assert state is not None
        number = state.number
        update = self._update(header, tensors, number - header.round)
        # From here to the submission nothing awaits: whatever is accepted is folded before the round's result is made.
        self._count(header, state)
        base = self.base(header) if header.round < number else None
        if self._training.is_small:
            problem = self._fold(header, update, base)
            self._after_fold(header, state, problem)
        else:
            folding = asyncio.get_running_loop().run_in_executor(self._folder, self._fold, header, update, base)
            state.folding[_key(header)] = folding

            def over(done: "asyncio.Future[OSError | StrategyError | None]") -> None:
                del state.folding[_key(header)]
                self._after_fold(header, state, None if done.cancelled() else done.exception() or done.result())

            folding.add_done_callback(over)
            # A client that goes away meanwhile cancels its call, but not the folding.
            problem = await asyncio.shield(folding)
        if self._training.broken is not None:
            return validation.reply(pb.PushReply.STALE, str(self._training.broken))
        if isinstance(problem, OSError):
            # A rule that keeps updates on disk, and the disk is full: the client tries again.
            self._training.message = f"an update cannot be kept: {problem.strerror or problem}; trying again"
            raise StorageError(self._training.message)
        return messages.reply(pb.PushReply.ACCEPTED, "", number)

    def _examine_values(self, header: pb.UpdateHeader, tensors: State) -> Fault | None:
        if (
            (fault := validation.examine_values(tensors)) is not None
            or not self._is_private
            or not self._training.frozen
        ):
            return fault
        base = self.base(header)
        return validation.examine_frozen(tensors, base, self._training.frozen) if base is not None else None

    def _update(self, header: pb.UpdateHeader, tensors: State, staleness: int) -> Update:
        discount = self._spec.stragglers.weight(staleness) if staleness else 1.0
        name, scalars = f"{header.pool}/{header.index}", dict(header.scalars)
        # What no client trains needs no noise.
        buffers = self._training.buffers | self._training.frozen if self._is_private else self._training.buffers
        return Update(name, header.num_examples, tensors, buffers, scalars, discount)

    def _count(self, header: pb.UpdateHeader, state: RoundState) -> None:
        client_id = (header.pool, header.index)
        if header.round < state.number:
            state.late.add((client_id, header.round))
        else:
            state.accepted.add(client_id)
            state.rejected.discard(client_id)
        client = self._members.get(client_id)
        seconds = client.took(header.round, time.monotonic()) if client is not None else 0.0
        loss = header.metrics.get("loss", math.nan)
        report = Report(header.round, header.num_examples, loss if math.isfinite(loss) else None, seconds)
        state.reports.append((client_id, report))
        self._training.examples += header.num_examples
        self._training.means.add(client_id, header.num_examples, header.metrics)
        self._statistics.submitted(header, state.number - header.round)

    def _after_fold(self, header: pb.UpdateHeader, state: RoundState, problem: BaseException | None) -> None:
        """An update has been folded; or it could not be kept, and what :meth:`_count` did is taken back."""
        self._training.changes.notify()
        if isinstance(problem, StrategyError):
            self._training.broken = problem
        if not isinstance(problem, OSError):
            return
        client_id = (header.pool, header.index)
        if header.round < state.number:
            state.late.discard((client_id, header.round))
        else:
            state.accepted.discard(client_id)
        state.reports[:] = [entry for entry in state.reports if (entry[0], entry[1].round) != (client_id, header.round)]
        self._training.examples -= header.num_examples
        self._statistics.withdrawn(header)

    def _fold(self, header: pb.UpdateHeader, update: Update, base: State | None) -> OSError | StrategyError | None:
        """Folds an update in, in any thread; returns what kept it from that. ``base``: a late one's."""
        started = time.monotonic()
        try:
            if base is not None:
                assert self._training.model is not None
                present = self._training.model.checkpoint.state
                rebase(update.tensors, base, present, update.buffers, self._strategy.rebases)
            self._strategy.accept(update)
        except (OSError, StrategyError) as error:
            return error
        except Exception as error:
            # Half of it may be in the sum, which nobody can trust any more.
            log.exception("%s: the strategy failed", update.client)
            return StrategyError(
                f"the strategy failed on the update of {update.client}: {type(error).__name__}: {error}; the "
                "aggregator's log has more"
            )
        self._statistics.folded(header.pool, time.monotonic() - started)
        self.receive_slots.give_back(update.tensors)
        return None

    def reject(self, header: pb.UpdateHeader, fault: Fault) -> pb.PushReply:
        """Refuses an update for good: the round does not wait for this client any longer."""
        if self._training.round is not None and header.round == self._training.round.number:
            client, rejected = (header.pool, header.index), self._training.round.rejected
            if client not in rejected and fault.reason in (Reason.NON_FINITE, Reason.RANGE):
                self._training.round.diverged[client] += 1
            rejected.add(client)
            self._training.round.fault = f"{header.pool}/{header.index}: {fault}"
            self._training.changes.notify()
        if header.round == 0:
            self._training.initialization.refused((header.pool, header.index))
            self._training.message = f"the initial weights of {header.pool}/{header.index} were refused: {fault}"
            self._training.changes.notify()
        log.warning("%s/%d: update of round %d refused: %s", header.pool, header.index, header.round, fault)
        return validation.reply(pb.PushReply.INVALID, fault.message, fault.reason)

    async def _in_thread(self, work: Callable[[State], T], state: State) -> T:
        """Does the work in a thread, unless the model is small."""
        return work(state) if self._training.is_small else await asyncio.to_thread(work, state)


def _key(header: pb.UpdateHeader) -> tuple[ClientId, int]:
    """Return which update it is."""
    return (header.pool, header.index), header.round
