"""Privacy budget of a job: the privacy spent by its published models, and whether one more round fits the budget.

The account is part of each round's record, which is committed with the round's model. So an unpublished model costs
nothing, and a published one is always accounted for. If a crash ends a round before its commit, its noise was never
published; the round is repeated with new noise.
"""

from collections.abc import Iterable

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.privacy import DifferentialPrivacy
from isthmus_contracts.dp_skellam import count_line, count_mean, grid_of
from isthmus_contracts.pb import federation_pb2 as pb

from ...privacy import Adaptation, Private
from ...privacy.account import Account, CentralNoise, ClientNoise, Costs
from ...strategies import Strategy
from ..storage.checkpoints import CheckpointError
from ..storage.round_record import RoundRecord


class PrivacyBudget:
    """Account of a job with differential privacy."""

    def __init__(self, spec: DifferentialPrivacy, mechanism: Private, costs: Costs) -> None:
        self._costs = costs
        self._delta = float(spec.delta)
        self._limit = float(spec.max_epsilon) if spec.max_epsilon is not None else None
        self._mechanism = mechanism
        self._clipped = 0.0
        self._epsilon, self._pays = 0.0, True
        self.discarded = 0
        """Sums of the round in progress that were opened, or may have been, and that no model came of."""
        self._spent = costs.of({})
        self._take(self._spent)

    @property
    def spent(self) -> bool:
        """True if the next round would exceed the budget."""
        return not self._pays

    def restore(self, newest: RoundRecord | None, records: Iterable[RoundRecord]) -> None:
        """Restore the account from the newest checkpoint's record, or from any record in which more was spent.

        ``newest``: ``None`` if no round is committed. ``records``: the records of all rounds that ever ran; models of
        removed checkpoints were published too. Raises :class:`CheckpointError` for a checkpoint without an account.
        """
        if newest is not None and not newest.privacy:
            raise CheckpointError(
                "the checkpoints were made without differential privacy, which cannot be added later; start a new job"
            )
        known = [record.privacy for record in (*records, *([newest] if newest else [])) if record.privacy]
        if known:
            self._take(max(map(self._costs.of, known), key=lambda spent: spent.epsilon(self._delta)))
        if newest is not None:
            self._clipped = newest.privacy.get("clipped_ratio", 0.0)
            norm = newest.privacy.get("next_clip_norm", self._mechanism.next_clip_norm)
            self._mechanism.clip_norm = self._mechanism.next_clip_norm = norm

    def account(self) -> dict[str, float]:
        """Return the account including the round in progress, for its record."""
        following = self._next()
        return {
            "epsilon": following.epsilon(self._delta),
            "delta": self._delta,
            "rounds": following.rounds,
            **self._costs.numbers(following),
            "clipped_ratio": self._mechanism.clipped_ratio,
            "clip_norm": self._mechanism.clip_norm,
            "next_clip_norm": self._mechanism.next_clip_norm,
        }

    def charge(self) -> None:
        """Charge the round in progress, which is committed."""
        self._clipped = self._mechanism.clipped_ratio
        following, self.discarded = self._next(), 0
        self._take(following)

    def charge_discarded(self) -> None:
        """Charge the :attr:`discarded` sums of a round that is abandoned."""
        charged, self.discarded = self._costs.after(self._spent, self.discarded), 0
        self._take(charged)

    def status(self) -> pb.PrivacyStatus:
        """Return the account as shown in the job's status."""
        return pb.PrivacyStatus(
            epsilon=self._epsilon, delta=self._delta, max_epsilon=self._limit or 0.0, rounds=self._spent.rounds,
            spent=self.spent, clipped_ratio=self._clipped, clip_norm=self._mechanism.next_clip_norm,
        )  # fmt: skip

    def _next(self) -> Account:
        return self._costs.after(self._spent, 1 + self.discarded)

    def _take(self, spent: Account) -> None:
        self._spent = spent
        self._epsilon = spent.epsilon(self._delta)
        self._pays = self._limit is None or self._next().epsilon(self._delta) <= self._limit


def protect(spec: FederatedJobSpec, rule: Strategy) -> tuple[Strategy, PrivacyBudget | None]:
    """Return a job's strategy, wrapped for differential privacy if the manifest asks for it, and the budget."""
    private = spec.privacy.differential_privacy
    if private is None:
        return rule, None
    expected, noise = spec.expected_updates, float(private.noise_multiplier)
    adaptation, contributors = Adaptation.of(private, expected), spec.noise_contributors
    mechanism = Private(
        rule, float(private.clip_norm), noise, expected, adaptation=adaptation, contributors=contributors
    )
    costs: Costs = CentralNoise(noise)
    if contributors:
        costs = _of_clients(spec, noise, adaptation, contributors)
    return mechanism, PrivacyBudget(private, mechanism, costs)


def _of_clients(spec: FederatedJobSpec, noise: float, adaptation: Adaptation | None, contributors: int) -> ClientNoise:
    secure = spec.privacy.secure_aggregation
    assert secure is not None
    multiplier = adaptation.sum_multiplier(noise) if adaptation is not None else noise
    lines = [grid_of(secure.bits, spec.most_trainers, multiplier, contributors).line]
    if adaptation is not None:
        lines.append(count_line(count_mean(adaptation.count_noise, contributors), contributors))
    return ClientNoise(*lines)
