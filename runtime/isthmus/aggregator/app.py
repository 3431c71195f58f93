"""Wiring of the aggregator: makes the parts for one job and connects them."""

import uuid
from concurrent.futures import ThreadPoolExecutor

from ..secure_aggregation.layout import Parameters
from ..secure_aggregation.sum_rule import SecureSum
from ..strategies import Strategy
from .clients.membership import Membership
from .job import Job
from .model.compression import Compression
from .rounds.client_sessions import ClientSessions
from .rounds.committer import RoundCommitter
from .rounds.coordinator import Coordinator
from .rounds.delivery import Delivery
from .rounds.durable_writer import DurableWriter
from .rounds.evaluation import Evaluations, ModelEvaluations
from .rounds.model_publisher import ModelPublisher
from .rounds.offers import Offers
from .rounds.privacy_budget import PrivacyBudget
from .rounds.secure_evaluation import SecureEvaluations
from .rounds.secure_instances import SecureInstances
from .rounds.status import StatusReporter
from .rpc.callers import Callers
from .rpc.connections import Connections
from .rpc.push import PushHandler
from .rpc.service import FederationService, ObserverService
from .secure.durable_state import DurableState
from .secure.masked_sums import EvaluationSum, TrainingSum
from .secure.rounds import SecureRounds
from .state.metrics_by_round import Progress
from .state.training_state import TrainingState
from .storage.checkpoints import CheckpointStore
from .telemetry.metrics import AggregatorMetrics
from .telemetry.round_statistics import RoundStatistics
from .telemetry.secure_metrics import SecureMetrics
from .telemetry.tracking.tracker import Tracker
from .updates.intake import Intake


class Aggregator:
    """The parts of one job's aggregator that its process, or a test, calls."""

    def __init__(
        self, job: Job, store: CheckpointStore, strategy: Strategy, metrics: AggregatorMetrics, tracker: Tracker,
        budget: PrivacyBudget | None = None,
    ) -> None:  # fmt: skip
        """``budget``: the budget of differential privacy, if ``strategy`` applies it."""
        spec, instance, statistics = job.spec, uuid.uuid4().hex, RoundStatistics(metrics)
        self.members = members = Membership(spec)
        self.training = training = TrainingState()
        self.progress = progress = Progress(spec.objective)
        compression = Compression(spec)
        # One thread, first in, first out: updates are folded one by one, and the result is computed after them.
        folder = ThreadPoolExecutor(1, "fold")
        writer = DurableWriter(store, training, statistics, metrics, tracker)
        secure: SecureRounds | None = None
        if spec.privacy.secure_aggregation is not None:
            durable = DurableState(store.directory, writer.keep)
            strategy = SecureSum(strategy, Parameters.of(spec), durable.accumulator.allocate)
            secure = SecureRounds(job, training, members, durable, folder, statistics, SecureMetrics(metrics))
        self.intake = intake = Intake(
            job, training, members, compression, strategy, statistics, folder, store.directory, secure
        )
        offers = Offers(spec, compression, statistics, secure)
        evaluations: ModelEvaluations = Evaluations(spec, training, members, progress, offers, writer)
        instances = None
        if secure is not None:
            secure.make_room = intake.receive_slots.clear
            assert isinstance(strategy, SecureSum)
            updates = TrainingSum(job.uid, spec, strategy, training)
            instances = SecureInstances(training, members, secure, updates, offers, statistics, offers.train)
            evaluations = SecureEvaluations(spec, training, members, progress, offers, writer, secure, SecureInstances(
                training, members, secure, EvaluationSum(Parameters.of(spec), durable.accumulator), offers, statistics,
                lambda client, current: offers.evaluate(client, current.base),
            ))  # fmt: skip
        publisher = ModelPublisher(store.directory, training.changes)
        delivery = Delivery(store, training, progress, writer, publisher, tracker)
        self.reporter = StatusReporter(spec, training, members, progress, tracker, publisher, metrics, budget, secure)
        committer = RoundCommitter(
            spec, training, members, store, strategy, compression, folder, progress, intake, offers, evaluations,
            writer, publisher, delivery, statistics, metrics, budget,
        )  # fmt: skip
        self.coordinator = Coordinator(
            spec, training, members, strategy, intake, offers, evaluations, committer, delivery, statistics,
            self.reporter, budget, instances,
        )  # fmt: skip
        self.sessions = ClientSessions(
            job, instance, training, members, intake.permissions, offers, evaluations, secure
        )
        self.connections = Connections(spec.total_clients)
        self.service = FederationService(
            Callers(spec, job.uid), self.connections, training, self.sessions,
            PushHandler(instance, training, intake, compression, statistics, metrics), strategy, statistics,
        )  # fmt: skip
        self.observer = ObserverService(job.uid, self.connections, self.coordinator, self.reporter, training.changes)
