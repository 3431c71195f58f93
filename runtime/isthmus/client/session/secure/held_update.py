"""A client's result as integers, before masks are added to it."""

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa
from isthmus_contracts.text import one_line

from ....codecs import Residual
from ....secure_aggregation.fixed_point import Contribution, Quantised, quantise
from ....secure_aggregation.layout import LayoutError
from ....secure_aggregation.parameters import UpdateKey
from ....tensors import State
from ...errors import FederationError

log = logging.getLogger("isthmus")

_FIELD = "privacy.secureAggregation"
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Work:
    """The work whose result is masked: a training round, or an evaluation."""

    purpose: "sa.SecureBegin.Purpose.ValueType"
    round: int
    attempt: int
    """As in the offer: above 0 if the round is trained again."""


@dataclass(frozen=True)
class Numbers:
    """Numbers of a result beside its tensors. All of them are masked."""

    examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Numbers about the training that the strategy requires."""
    evaluation: pb.Evaluation | None = None
    """Evaluation of the base model."""


@dataclass(frozen=True, eq=False)
class HeldUpdate:
    """A result, rounded once. It leaves the client only under masks, and is kept until its round is over."""

    work: Work
    base_sha256: str
    """Digest of the base model and the settings (``secure_aggregation.basis``)."""
    layout: bytes
    """Form of the instance's vectors, serialized."""
    tensors: State
    residual: Residual | None = None
    """The coordinates' values that the result leaves out, if only some travel."""
    number: int = field(default_factory=lambda: next(_numbers))
    """Number of the result in this process."""

    @property
    def key(self) -> UpdateKey:
        """Identity of the result in the protocol."""
        return UpdateKey(self.work.round, self.base_sha256, self.work.attempt, str(self.number))


class Quantiser:
    """Maker of held updates, which warns once of each number without a bound or beyond it."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def hold(
        self, work: Work, layout: sa.SecureLayout, base_sha256: str, base: State, live: Mapping[str, torch.Tensor],
        numbers: Numbers, *, consume: bool, residual: Residual | None = None,
    ) -> HeldUpdate:  # fmt: skip
        """Return a result in the layout's form, independent of later training.

        ``base``: the model that it is the difference from. ``consume``: the integers may take its memory.
        ``residual``: what earlier rounds left out.
        Metrics without a bound in the manifest cannot be masked and stay here. Raises ``UpdateError`` for weights that
        cannot be sent, and :class:`FederationError` if the layout does not fit them.
        """
        evaluation = numbers.evaluation or pb.Evaluation()
        contribution = Contribution(
            numbers.examples, numbers.scalars, numbers.metrics, dict(evaluation.metrics), evaluation.num_examples
        )  # fmt: skip
        try:
            quantised = quantise(layout, base, _OnCpu(live), contribution, consume=consume, residual=residual)
        except LayoutError as error:
            raise FederationError(f"secure aggregation: the layout does not fit: {error}") from None
        self._warn(layout, quantised, numbers)
        form = layout.SerializeToString(deterministic=True)
        return HeldUpdate(work, base_sha256, form, quantised.tensors, quantised.residual)

    def _warn(self, layout: sa.SecureLayout, quantised: Quantised, numbers: Numbers) -> None:
        bounds = {scalar.name: (scalar.least, scalar.most) for scalar in layout.scalars}
        for name in quantised.limited:
            least, most = bounds[name]
            bounded = f"{name} is beyond its bounds, {least:g} to {most:g} (spec.{_FIELD}.metrics)"
            self._warn_once(name, f"{bounded}: it counts as the bound")
        if quantised.capped:
            most = layout.max_examples
            above = f"num_examples is above the largest weight of this round, {most:g} (spec.{_FIELD}.maxExamples)"
            self._warn_once("examples", f"{above}: it counts as the bound")
        for name in quantised.unbounded:
            shown = one_line(name, 64)
            self._warn_once(
                f"unbounded {name}",
                f"the metric {shown} has no bound and is not sent: to have its mean over all clients, add its largest"
                f" absolute value to spec.{_FIELD}.metrics",
            )

    def _warn_once(self, name: str, text: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            log.warning("secure aggregation: %s", text)


class _OnCpu(Mapping[str, torch.Tensor]):
    """Tensors of a model on any device, of which the one in use is copied to main memory."""

    def __init__(self, live: Mapping[str, torch.Tensor]) -> None:
        self._live = live
        self._newest: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._newest is None or self._newest[0] != name:
            self._newest = None  # its memory may be needed for the next one
            self._newest = name, self._live[name].detach().to("cpu").resolve_neg()
        return self._newest[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._live)

    def __len__(self) -> int:
        return len(self._live)
