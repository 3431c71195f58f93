"""Privacy budget of a job: the privacy spent by its published models, and whether one more round fits the budget.

The account is part of each round's record, which is committed with the round's model. So an unpublished model costs
nothing, and a published one is always accounted for. If a crash ends a round before its commit, its noise was never
published; the round is repeated with new noise.
"""

from collections.abc import Iterable, Mapping

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.privacy import DifferentialPrivacy
from isthmus_contracts.dp_accounting import Spent
from isthmus_contracts.pb import federation_pb2 as pb

from ...privacy import Adaptation, Private
from ...strategies import Strategy
from ..storage.checkpoints import CheckpointError
from ..storage.round_record import RoundRecord


class PrivacyBudget:
    """Account of a job with differential privacy."""

    def __init__(self, spec: DifferentialPrivacy, mechanism: Private) -> None:
        self._noise = float(spec.noise_multiplier)
        self._delta = float(spec.delta)
        self._limit = float(spec.max_epsilon) if spec.max_epsilon is not None else None
        self._mechanism = mechanism
        self._spent = Spent()
        self._next = self._spent.after(self._noise)
        self._clipped = 0.0
        self._epsilon, self._pays = 0.0, True
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
            self._take(max(map(_spent, known), key=lambda spent: spent.mu_squared))
        if newest is not None:
            self._clipped = newest.privacy.get("clipped_ratio", 0.0)
            norm = newest.privacy.get("next_clip_norm", self._mechanism.next_clip_norm)
            self._mechanism.clip_norm = self._mechanism.next_clip_norm = norm

    def account(self) -> dict[str, float]:
        """Return the account including the round in progress, for its record."""
        return {
            "epsilon": self._next.epsilon(self._delta),
            "delta": self._delta,
            "rounds": self._next.rounds,
            "mu_squared": self._next.mu_squared,
            "clipped_ratio": self._mechanism.clipped_ratio,
            "clip_norm": self._mechanism.clip_norm,
            "next_clip_norm": self._mechanism.next_clip_norm,
        }

    def charge(self) -> None:
        """Charge the round in progress, which is committed."""
        self._clipped = self._mechanism.clipped_ratio
        self._take(self._next)

    def status(self) -> pb.PrivacyStatus:
        """Return the account as shown in the job's status."""
        return pb.PrivacyStatus(
            epsilon=self._epsilon, delta=self._delta, max_epsilon=self._limit or 0.0, rounds=self._spent.rounds,
            spent=self.spent, clipped_ratio=self._clipped, clip_norm=self._mechanism.next_clip_norm,
        )  # fmt: skip

    def _take(self, spent: Spent) -> None:
        self._spent, self._next = spent, spent.after(self._noise)
        self._epsilon = spent.epsilon(self._delta)
        self._pays = self._limit is None or self._next.epsilon(self._delta) <= self._limit


def protect(spec: FederatedJobSpec, rule: Strategy) -> tuple[Strategy, PrivacyBudget | None]:
    """Return a job's strategy, wrapped for differential privacy if the manifest asks for it, and the budget."""
    private = spec.privacy.differential_privacy
    if private is None:
        return rule, None
    expected = spec.expected_updates
    mechanism = Private(
        rule, float(private.clip_norm), float(private.noise_multiplier), expected,
        adaptation=Adaptation.of(private, expected),
    )  # fmt: skip
    return mechanism, PrivacyBudget(private, mechanism)


def _spent(account: Mapping[str, float]) -> Spent:
    return Spent(int(account["rounds"]), account["mu_squared"])
