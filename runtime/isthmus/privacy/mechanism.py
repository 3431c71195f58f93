"""Gaussian mechanism over the clients' changes of the model."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from isthmus_contracts.pb import secure_aggregation_pb2 as pb

from ..strategies.base import Strategy, StrategyError, Update
from ..tensors import State, wide
from .adaptive import Adaptation
from .noise import Normals, gaussian

# Steps per clipping bound to which a change is rounded. A sum over 2^31 clients still fits 64 bits, and noise of up to
# 100,000 bounds is a whole number that a double can hold.
_STEPS = 2**32
# Relative margin below the bound, larger than all rounding errors of doubles when a change is scaled.
_SLACK = 1e-9
# Values processed at a time: 2 MiB of doubles.
_BLOCK = 1 << 18
# Last components of the names of batch and instance normalisation statistics.
_STATISTICS = frozenset({"running_mean", "running_var"})


class Private(Strategy):
    """DP-FedAvg with a fixed denominator: a rule receives the noisy mean of the clipped changes as one update.

    McMahan et al., "Learning Differentially Private Recurrent Language Models" (2018), algorithm 1 and its estimator
    f_f, with weights of 1 and flat clipping: each client's change, over all floating-point tensors together, is scaled
    down to ``clip_norm`` if its norm is larger; Gaussian noise of standard deviation ``noise_multiplier * clip_norm``
    is added to the sum of a round, which is divided by ``clients``, a number independent of the participants.
    The rule's computation, and every later round, is post-processing. Numbers of examples do not count.

    Doubles would break the proof twice: their sums depend on more than the summands (Casacuberta et al. 2022), and the
    last bits of noise reveal the value that it was added to (Mironov 2012). So changes are truncated to whole
    steps of ``clip_norm / 2^32`` and summed as integers, and the noise is rounded to steps, too: this is the ideal
    mechanism, rounded afterwards. An integer sum also does not depend on the order.

    With an :class:`Adaptation`, the norm follows the updates.

    Integers, booleans, and tensors that no optimizer trains keep the model's values.
    """

    order_free = True

    def __init__(
        self, rule: Strategy, clip_norm: float, noise_multiplier: float, clients: int,
        normals: Callable[[int], Normals] = gaussian, adaptation: Adaptation | None = None, contributors: int = 0,
    ) -> None:  # fmt: skip
        """``normals``: returns a number of independent standard normal numbers. ``clip_norm``: with ``adaptation``,
        that of the first round. ``contributors``: if above 0, the clients add the noise, and this many enough of it.
        """
        self._rule = rule
        self.clip_norm = self.next_clip_norm = clip_norm
        """Norms of the round in progress, and of the one after it."""
        self._adaptation = adaptation
        self._contributors = contributors
        self._noise = adaptation.sum_multiplier(noise_multiplier) if adaptation else noise_multiplier
        self._clients = clients
        self._normals = normals
        self._model: State = {}
        self._sums: State = {}
        self._still: frozenset[str] = frozenset()
        self._updates, self._clipped = 0, 0.0
        self._share = 1.0

    @property
    def clipped_ratio(self) -> float:
        """Share of the round's updates whose norm exceeded the bound. With adaptive clipping, its noisy value once the
        round is finished: the exact one stays secret, as the account covers the noisy count alone."""
        if self._adaptation is not None:
            return min(max(1.0 - self._share, 0.0), 1.0)
        return self._clipped / self._updates if self._updates else 0.0

    def check(self, model: State) -> None:
        """Raise :class:`StrategyError` if the model cannot be trained with noise."""
        statistics = [name for name in model if name.rpartition(".")[2] in _STATISTICS]
        if statistics:
            shown = ", ".join(statistics[:3]) + (", …" if len(statistics) > 3 else "")
            raise StrategyError(
                f"spec.privacy.differentialPrivacy: the model holds statistics of its clients' data ({shown}), which"
                " noise would make useless; use GroupNorm or LayerNorm instead"
            )

    def secure_noise(self) -> pb.SecureNoise:
        """Return the part of the mechanism that clients do themselves in the next round, under secure aggregation."""
        noise = pb.SecureNoise(clip_norm=self.next_clip_norm)
        if self._contributors:
            noise.kind, noise.noise_multiplier = pb.SecureNoise.SKELLAM, self._noise
            noise.contributors = self._contributors
            noise.count_noise = self._adaptation.count_noise if self._adaptation is not None else 0.0
        return noise

    def begin(self, model: State) -> None:
        self.check(model)
        self._model = model
        trained = {name: tensor for name, tensor in model.items() if tensor.is_floating_point()}
        if self._sums.keys() != trained.keys():
            self._sums = {
                name: torch.empty(tensor.numel(), dtype=torch.int64, device="cpu") for name, tensor in trained.items()
            }
        for total in self._sums.values():
            total.zero_()
        self._still = frozenset(trained)
        self._updates, self._clipped = 0, 0.0
        self.clip_norm = self.next_clip_norm

    def accept(self, update: Update) -> None:
        names = [name for name in self._sums if name not in update.buffers]
        norm = self._norm(update, names)
        most = self.clip_norm * (1 - _SLACK)
        self._updates += 1
        self._clipped += not norm <= self.clip_norm
        # A tensor that at least one client reports as trained gets noise; one that none does has not been changed.
        self._still &= update.buffers
        if not math.isfinite(norm):
            return  # so large that doubles do not hold the direction
        steps = _STEPS / self.clip_norm * min(1.0, most / norm if norm else 1.0)
        for name in names:
            total = self._sums[name]
            for start, change in self._changes(update, name):
                total[start : start + len(change)] += change.mul_(steps).trunc_().to(torch.int64)

    def finish(self) -> State:
        self._adapt(noisy=False)
        released = {
            name: self._release(name, total, _STEPS, self._noise * _STEPS)
            for name, total in self._sums.items()
            if name not in self._still
        }
        return self._apply(released)

    def finish_sum(
        self, model: State, sums: Mapping[str, torch.Tensor], clip_norm: float, steps: int, clients: int,
        clipped: float, *, noisy: bool = False,
    ) -> State:  # fmt: skip
        """Return the next model after a round whose changes were clipped and summed elsewhere (secure aggregation).

        ``sums``: of each trained tensor, integers of one dimension, in units of ``clip_norm / steps``; no client's
        integers have an L2 norm above ``steps``. They are overwritten. Tensors that are not in it keep their values.
        ``clients``, ``clipped``: the numbers of clients in the sum, and of those whose change was scaled down.
        ``noisy``: the clients have added the noise, to the number of clipped changes as well.
        """
        self._model, self._sums = model, {}
        self._still = frozenset(
            name for name, tensor in model.items() if tensor.is_floating_point() and name not in sums
        )
        self.clip_norm, self._updates, self._clipped = clip_norm, clients, clipped
        self._adapt(noisy=noisy)
        noise = 0.0 if noisy else self._noise * steps
        return self._apply({name: self._release(name, total, steps, noise) for name, total in sums.items()})

    def _adapt(self, *, noisy: bool) -> None:
        """Set the norm of the next round."""
        if self._adaptation is not None:
            noise = 0.0 if noisy else float(self._normals(1)[0])
            self._share = self._adaptation.share(self._updates - self._clipped, self._updates, noise)
            self.next_clip_norm = self._adaptation.next_norm(self.clip_norm, self._share)

    def _apply(self, released: State) -> State:
        """Pass the noisy tensors to the rule as one update; the others keep the model's values."""
        tensors = {name: released.get(name, old) for name, old in self._model.items()}
        self._rule.begin(self._model)
        self._rule.accept(Update("all", 1, tensors, buffers=self._still))
        return self._rule.finish()

    def release(self) -> None:
        self._rule.release()

    def companion(self) -> State:
        return self._rule.companion()

    def state(self) -> State:
        return self._rule.state()

    def load_state(self, state: State) -> None:
        self._rule.load_state(state)

    def _norm(self, update: Update, names: list[str]) -> float:
        """Return the L2 norm of a client's change, which is not finite if a double cannot hold it."""
        squares = 0.0
        for name in names:
            for _, change in self._changes(update, name):
                squares += float(change.square_().sum())
        return math.sqrt(squares) if math.isfinite(squares) else math.inf

    def _changes(self, update: Update, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield a tensor's change block by block, as doubles, each with the block's start."""
        new, old = update.tensors[name].reshape(-1), self._model[name].reshape(-1)
        for start in range(0, len(old), _BLOCK):
            block = slice(start, start + _BLOCK)
            yield start, new[block].to(torch.float64, copy=True).sub_(old[block])

    def _release(self, name: str, total: torch.Tensor, steps: int, deviation: float) -> torch.Tensor:
        """Return the model's tensor plus the mean change, with noise of this standard deviation in steps."""
        old = self._model[name].reshape(-1)
        dtype = wide(old.dtype)
        # Written to the sum's own memory if it is large enough, never beyond the part that has been read.
        fits = total.element_size() >= dtype.itemsize
        result = total.view(dtype)[: len(old)] if fits else torch.empty(len(old), dtype=dtype, device="cpu")
        scale = self.clip_norm / steps / self._clients
        for start in range(0, len(old), _BLOCK):
            block = slice(start, start + _BLOCK)
            noisy = total[block].to(torch.int64, copy=True)
            if deviation:
                noise = torch.from_numpy(self._normals(len(old[block]))).mul_(deviation).round_()
                noisy.add_(noise.to(torch.int64))
            noisy = noisy.double()
            result[block] = noisy.mul_(scale).add_(old[block])
        return result.view(self._model[name].shape)
