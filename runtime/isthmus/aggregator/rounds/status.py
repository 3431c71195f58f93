"""What the world sees of a job's training: its status and its metrics."""

import asyncio

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.pb import federation_pb2 as pb

from ..clients.membership import Membership
from ..state.metrics_by_round import Progress
from ..state.training_state import TrainingState
from ..telemetry.metrics import AggregatorMetrics
from ..telemetry.tracking.tracker import Tracker
from .model_publisher import ModelPublisher
from .privacy_budget import PrivacyBudget

# Metrics follow the state at most this much later. Seconds.
_METRICS_PACE = 0.2


class StatusReporter:
    """Reads where training stands; changes nothing but metrics."""

    def __init__(
        self, spec: FederatedJobSpec, training: TrainingState, members: Membership, progress: Progress,
        tracker: Tracker, publisher: ModelPublisher, metrics: AggregatorMetrics, budget: PrivacyBudget | None = None,
    ) -> None:  # fmt: skip
        self._spec = spec
        self._training = training
        self._members = members
        self._progress = progress
        self._tracker = tracker
        self._publisher = publisher
        self._metrics = metrics
        self._budget = budget
        self._due: asyncio.TimerHandle | None = None

    def status(self) -> pb.FederationStatus:
        """What the operator sees."""
        training, state = self._training, self._training.round
        completed = training.completed
        warnings = [*training.warnings, *filter(None, (self._progress.note, *self._tracker.notes))]
        status = pb.FederationStatus(
            phase=training.phase,
            message=training.message or next(iter(warnings), ""),
            current_round=state.number if state else completed,
            completed_rounds=completed,
            total_rounds=self._spec.rounds,
            min_clients=self._spec.min_clients,
            pools=self._members.pool_statuses(),
            metrics=[self._progress.newest[name] for name in sorted(self._progress.newest)],
            best=self._progress.best,
            selected=len(state.selected) if state else 0,
            submitted=state.updates if state else 0,
            round_started=training.round_started,
            started=training.started,
            model=self._publisher.newest,
            best_model=self._publisher.best,
            warnings=warnings,
            target_round=self._progress.reached or 0,
        )
        if self._budget is not None:
            status.privacy.CopyFrom(self._budget.status())
        return status

    def refresh_soon(self) -> None:
        """Brings the metrics up to date in a moment."""
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(_METRICS_PACE, self.refresh)

    def refresh(self) -> None:
        """Brings the metrics up to date."""
        self._due = None
        self._metrics.show(self.status(), self._training.round.number if self._training.round else 0)
