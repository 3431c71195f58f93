"""Status and metrics of a job's training, as observers see them."""

import asyncio

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.pb import federation_pb2 as pb

from ..clients.membership import Membership
from ..secure.rounds import SecureRounds
from ..state.metrics_by_round import Progress
from ..state.training_state import TrainingState
from ..telemetry.metrics import AggregatorMetrics
from ..telemetry.tracking.tracker import Tracker
from .model_publisher import ModelPublisher
from .privacy_budget import PrivacyBudget

# Longest delay of the metrics behind the state. Seconds.
_METRICS_PACE = 0.2


class StatusReporter:
    """Reader of the training state, as status and metrics."""

    def __init__(
        self, spec: FederatedJobSpec, training: TrainingState, members: Membership, progress: Progress,
        tracker: Tracker, publisher: ModelPublisher, metrics: AggregatorMetrics, budget: PrivacyBudget | None = None,
        secure: SecureRounds | None = None,
    ) -> None:  # fmt: skip
        self._spec = spec
        self._training = training
        self._members = members
        self._progress = progress
        self._tracker = tracker
        self._publisher = publisher
        self._metrics = metrics
        self._budget = budget
        self._secure = secure
        self._due: asyncio.TimerHandle | None = None
        metrics.rounds_planned.set(spec.rounds)

    def status(self) -> pb.FederationStatus:
        """Return the status for observers, such as the operator."""
        training, current = self._training, self._training.round
        completed = training.completed
        warnings = [*training.warnings, *filter(None, (self._progress.note, *self._tracker.notes))]
        status = pb.FederationStatus(
            phase=training.phase,
            message=training.message or next(iter(warnings), ""),
            current_round=min(current.number, self._spec.rounds) if current else completed,
            completed_rounds=completed,
            total_rounds=self._spec.rounds,
            min_clients=self._spec.min_clients,
            pools=self._members.pool_statuses(),
            metrics=[self._progress.newest[name] for name in sorted(self._progress.newest)],
            best=self._progress.best,
            selected=len(current.selected) if current else 0,
            submitted=current.updates if current else 0,
            round_started=training.round_started,
            started=training.started,
            model=self._publisher.newest,
            best_model=self._publisher.best,
            warnings=warnings,
            target_round=self._progress.reached or 0,
        )
        if self._budget is not None:
            status.privacy.CopyFrom(self._budget.status())
        if self._secure is not None:
            status.secure.CopyFrom(self._secure.status)
        return status

    def refresh_soon(self) -> None:
        """Schedule an update of the metrics."""
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(_METRICS_PACE, self.refresh)

    def refresh(self) -> None:
        """Update the metrics."""
        self._due = None
        self._metrics.show(self.status(), self._training.round.number if self._training.round else 0)
