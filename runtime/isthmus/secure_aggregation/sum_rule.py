"""Aggregation of masked updates: sums of integers, from which a rule gets one update that stands for all."""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.pb.federation_pb2 import TensorSpec

from ..libc import give_pages_back
from ..privacy import Private
from ..strategies.base import Strategy, StrategyError, Update
from ..tensors import State, allocate, flat
from .encoding.scalars import LONG, STEPS
from .fixed_point import Sums, dequantise, mean_change, moved
from .layout import (
    SLOPE,
    History,
    LayoutError,
    Parameters,
    first_clip,
    is_exact,
    levels,
    make_layout,
    source,
    unit,
    wire_specs,
)
from .primitives.masks import add_masks

Allocate = Callable[[Sequence[TensorSpec]], State]


class ImplausibleSumError(StrategyError):
    """A sum has a value that no honest clients can have caused. The round's sum is worthless."""


class SecureSum(Strategy):
    """Sum modulo 2^b of masked updates; a linear rule receives its weighted mean as one update.

    A round: :meth:`arrange` once; for each instance of the protocol :meth:`begin` and :meth:`accept`; then
    :meth:`unmask`, :attr:`sums` and :meth:`finish`. Updates hold the tensors of ``layout.wire_specs``; their number of
    examples and their metrics are in the masked scalars. The sum does not depend on the order of the updates.

    The rule's result is what it would have made of the single updates, within ``fixed_point.quantisation_bound``. For
    the weighted mean of changes (FedAvg, FedProx and the server optimizers) this is plain. FedNova's clients divide
    their changes by their steps, and SCAFFOLD's send a second set, divided by their travel. With differential privacy
    the rule is :class:`isthmus.privacy.Private`, which adds noise to the sum.
    """

    order_free = True

    def __init__(self, rule: Strategy, parameters: Parameters, allocate: Allocate | None = None) -> None:
        """``allocate``: returns tensors for the sum that are mapped from a file. Default: in memory."""
        self._rule = rule
        self._parameters = parameters
        self._allocate = allocate
        self._history = History()
        self._layout: pb.SecureLayout | None = None
        self._model: State = {}
        self._buffers: frozenset[str] = frozenset()
        self._sums: Sums | None = None
        self.accumulator: State = {}
        """Sum of the updates so far: the layout's tensors, and the scalars."""
        self.contributors = 0
        """Number of updates in the sum."""

    @property
    def layout(self) -> pb.SecureLayout:
        """Layout of the round that was arranged last."""
        assert self._layout is not None, "arrange() comes first"
        return self._layout

    @property
    def sums(self) -> Sums:
        """Sums of the round's scalars, after :meth:`unmask`."""
        assert self._sums is not None, "unmask() comes first"
        return self._sums

    @property
    def history(self) -> History:
        """Public results of the rounds so far, on which the next layout depends."""
        return self._history

    def arrange(
        self, model: State, buffers: Collection[str] = (), frozen: Collection[str] = (), seed: bytes = b"",
        noise: pb.SecureNoise | None = None,
    ) -> pb.SecureLayout:  # fmt: skip
        """Fix and return the layout of a round, which all its instances share. Arguments: as of ``make_layout``.

        Raises :class:`StrategyError` if the model cannot be summed.
        """
        if noise is None and isinstance(self._rule, Private):
            noise = self._rule.secure_noise()
        try:
            layout = make_layout(self._parameters, model, buffers, frozen, self._history, seed, noise)
        except LayoutError as error:
            raise StrategyError(f"spec.privacy.secureAggregation: {error}") from None
        if isinstance(self._rule, Private):
            self._rule.check(model)
        self._layout, self._buffers = layout, frozenset(buffers)
        return layout

    def begin(self, model: State) -> None:
        """Start an instance with an empty sum. ``model``: the round's, as it was given to :meth:`arrange`."""
        self.resume(model, 0)
        for tensor in self.accumulator.values():
            tensor.zero_()

    def resume(self, model: State, contributors: int) -> None:
        """Go on with the sum of this number of updates that the allocated tensors hold already."""
        self._model, self.contributors, self._sums = model, contributors, None
        self._rule.release()  # its result has been stored
        specs = wire_specs(self.layout)
        if self._allocate is None:
            self.accumulator = {spec.name: allocate(spec, self.accumulator) for spec in specs}
            return
        held = {name: list(tensor.shape) for name, tensor in self.accumulator.items()}
        if held != {spec.name: list(spec.shape) for spec in specs}:
            self.accumulator = self._allocate(specs)

    def accept(self, update: Update) -> None:
        """Add a masked update. Integers wrap around, which the masks need."""
        for name, total in self.accumulator.items():
            total.add_(update.tensors[name])
        self.contributors += 1

    def unmask(self, plan: Sequence[tuple[bytes, int]], threads: int = 1) -> Sums:
        """Subtract the masks that remain in the sum, given as keys with their signs, and return its scalars.

        The sum is changed in place, segment by segment. Raises :class:`ImplausibleSumError`.
        """
        add_masks(self.accumulator, [(key, -sign) for key, sign in plan], threads)
        return self.open()

    def open(self) -> Sums:
        """Return the scalars of a sum that has no masks. Raises :class:`ImplausibleSumError`."""
        self._sums = dequantise(self.layout, self.accumulator, self.contributors)
        if self._sums.implausible:
            names = ", ".join(self._sums.implausible[:3])
            raise ImplausibleSumError(
                f"secure aggregation: the sum of {self.contributors} clients' {names} is beyond its bounds, so at"
                " least one client sent integers that are no update; the masks hide which one"
            )
        return self._sums

    def finish(self) -> State:
        if isinstance(self._rule, Private):
            return self._finish_private(self._rule)
        layout, model, sums = self.layout, self._model, self.sums
        weight = sums.weight if layout.max_examples else float(self.contributors)
        factor = sums.scalars[STEPS] / weight if STEPS in sums.scalars else 1.0
        tensors = {tensor.name: tensor for tensor in layout.tensors}
        self._history = self._after(weight)

        def result(name: str) -> torch.Tensor:
            if (tensor := tensors.get(name)) is None:
                return model[name]
            by = factor if tensor.divisor else 1.0
            total = self._take(name)
            value = moved(layout, tensor, total, model[name], weight, by)
            self._spend(total)
            return value

        def slope(name: str) -> torch.Tensor:
            if SLOPE + name not in tensors:
                return torch.zeros_like(model[name])
            total = self._take(SLOPE + name)
            value = mean_change(layout, tensors[SLOPE + name], total, model[name], weight)
            self._spend(total)
            return value

        slopes = _Lazy(slope) if any(name.startswith(SLOPE) for name in tensors) else {}
        self._rule.begin(model)
        numbers = dict.fromkeys(self._rule.scalars, 1.0)
        examples = max(round(weight), 1)
        update = Update("all", examples, _Lazy(result), self._buffers, numbers, count=self.contributors, slopes=slopes)
        self._rule.accept(update)
        return self._rule.finish()

    def _finish_private(self, rule: Private) -> State:
        totals = {source(tensor): flat(self.accumulator[tensor.name]) for tensor in self.layout.tensors}
        clip_norm, steps = self.layout.noise.clip_norm, levels(self.layout)
        clipped, noisy = self.sums.scalars[LONG], bool(self.layout.noise.noise_multiplier)
        return rule.finish_sum(self._model, totals, clip_norm, steps, self.contributors, clipped, noisy=noisy)

    def _take(self, name: str) -> torch.Tensor:
        """Return a tensor of the sum. If its memory is the strategy's own, it is freed once it has been used."""
        return self.accumulator.pop(name) if self._allocate is None else self.accumulator[name]

    def _spend(self, total: torch.Tensor) -> None:
        """Free the memory of a tensor of the sum that is mapped from a file, which keeps the sum as it was."""
        if self._allocate is not None:
            give_pages_back(total.data_ptr(), total.nbytes)

    def _after(self, weight: float) -> History:
        """Return the history with this round's results."""
        most, firsts = {}, {}
        for tensor in self.layout.tensors:
            if is_exact(tensor):
                continue
            total = self.accumulator[tensor.name]
            least, greatest = torch.aminmax(total)
            most[tensor.name] = max(abs(int(least)), abs(int(greatest))) * unit(self.layout, tensor) / weight
            trained = source(tensor) not in self._buffers
            firsts[tensor.name] = first_clip(self._parameters, tensor.name, trained=trained)
        return self._history.after(self.layout.bits, most, firsts, self.sums.clipped_share, weight, self.sums.capped)

    def companion(self) -> State:
        return self._rule.companion()

    def problem_with(self, scalars: Mapping[str, float]) -> str | None:
        return "the numbers of an update are masked under secure aggregation, not sent in clear" if scalars else None

    def state(self) -> State:
        return self._rule.state() | self._history.state()

    def load_state(self, state: State) -> None:
        self._history = History.of_state(state)
        self._rule.load_state(state)


class _Lazy(dict[str, torch.Tensor]):
    """Tensors that are computed when a rule reads them, so that they need not all be in memory at once."""

    def __init__(self, compute: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, name: str) -> torch.Tensor:
        return self._compute(name)

    def __bool__(self) -> bool:
        return True
