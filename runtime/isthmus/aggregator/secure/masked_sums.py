"""Sums that instances open: the updates of a round, and the evaluations of the final model."""

from collections.abc import Mapping, Sequence

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.pb import secure_aggregation_pb2 as sa

from ...secure_aggregation.basis import Settings, basis_digest
from ...secure_aggregation.fixed_point import Measured, Sums, dequantise
from ...secure_aggregation.layout import Parameters, evaluation_layout, public_seed, wire_specs
from ...secure_aggregation.primitives.masks import add_masks
from ...secure_aggregation.sum_rule import SecureSum
from ...strategies import StrategyError, Update
from ...tensors import State, sha256_of
from ..model import messages
from ..state.round_sums import RoundSums
from ..state.training_state import TrainingState
from .accumulator import AccumulatorFile


class TrainingSum:
    """Sum of a round's updates, which the job's strategy turns into the next model."""

    purpose = sa.SecureBegin.TRAIN

    def __init__(self, job_uid: str, spec: FederatedJobSpec, rule: SecureSum, training: TrainingState) -> None:
        """``rule``: allocates its sums by :meth:`AccumulatorFile.allocate`."""
        self._job_uid = job_uid
        self._spec = spec
        self._rule = rule
        self._training = training

    def arrange(self, number: int, model: State) -> sa.SecureLayout:
        training = self._training
        return self._rule.arrange(model, training.buffers, training.frozen, public_seed(self._job_uid, number))

    def basis(self, number: int, model: State) -> str:
        settings = Settings(
            self._spec.strategy.algorithm, messages.parameters(self._spec), self._spec.task.config_of(number)
        )
        companion = self._rule.companion()
        return basis_digest(sha256_of(model), settings, sha256_of(companion) if companion else "")

    def begin(self, model: State) -> None:
        self._rule.accumulator = {}  # unmasked in memory of its own: see adopt
        self._rule.begin(model)

    def adopt(self, model: State, accumulator: State, contributors: int) -> None:
        self._rule.accumulator = accumulator
        self._rule.resume(model, contributors)

    def accept(self, update: Update) -> None:
        self._rule.accept(update)

    @property
    def accumulator(self) -> State:
        return self._rule.accumulator

    def unmask(self, plan: Sequence[tuple[bytes, int]], threads: int) -> None:
        self._rule.unmask(plan, threads)

    @property
    def opened(self) -> RoundSums:
        return _shown(self._rule.sums)


class EvaluationSum:
    """Sum of the clients' evaluations of the final model."""

    purpose = sa.SecureBegin.EVALUATE

    def __init__(self, parameters: Parameters, file: AccumulatorFile) -> None:
        self._layout = evaluation_layout(parameters)
        self._file = file
        self._contributors = 0
        self._sums: Sums | None = None
        self.accumulator: State = {}

    def arrange(self, number: int, model: State) -> sa.SecureLayout:
        return self._layout

    def basis(self, number: int, model: State) -> str:
        return basis_digest(sha256_of(model), Settings())

    def begin(self, model: State) -> None:
        self.adopt(model, self._file.allocate(wire_specs(self._layout)), 0)
        for total in self.accumulator.values():
            total.zero_()

    def adopt(self, model: State, accumulator: State, contributors: int) -> None:
        self.accumulator, self._contributors, self._sums = accumulator, contributors, None

    def accept(self, update: Update) -> None:
        for name, total in self.accumulator.items():
            total.add_(update.tensors[name])
        self._contributors += 1

    def unmask(self, plan: Sequence[tuple[bytes, int]], threads: int) -> None:
        add_masks(self.accumulator, [(key, -sign) for key, sign in plan], threads)
        self._sums = dequantise(self._layout, self.accumulator, self._contributors)
        if self._sums.implausible:
            raise StrategyError(f"the sum of the evaluations is beyond its bounds ({self._sums.implausible[0]})")

    @property
    def opened(self) -> RoundSums:
        assert self._sums is not None, "unmask() comes first"
        return _shown(self._sums)


def _shown(sums: Sums) -> RoundSums:
    return RoundSums(sums.weight, _means(sums.metrics), _means(sums.evaluation), sums.clipped_share)


def _means(measured: Mapping[str, Measured]) -> dict[str, float]:
    """Return the means of the metrics that any client has reported."""
    return {name: metric.mean for name, metric in measured.items() if metric.examples > 0}
