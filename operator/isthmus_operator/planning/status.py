"""The FederatedJob's status as the operator writes it. Pure."""

import copy
import datetime as dt
from collections.abc import Iterable, Mapping
from decimal import ROUND_CEILING, Context
from typing import Any

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.federated_job_status import ConditionType, Reason

from .. import names
from ..render.aggregator import STATE_DIR
from ..state.observed import FederationView, Job, Metric, SecureView
from ..state.timestamps import parse_timestamp, timestamp
from ..text import headline, plural
from .context import PoolOutcome

_DIGITS = 4  # significant digits: enough to compare models, without changes of the status by noise
# Exactly one is True, see :mod:`.readiness`.
SUMMARY = (ConditionType.READY, ConditionType.RECONCILING, ConditionType.STALLED)
_FINISHED = (ConditionType.COMPLETE, ConditionType.FAILED)


def condition(status: Mapping[str, Any], type_: str) -> Mapping[str, Any] | None:
    """Return the condition of that type, if the status has it."""
    return next((item for item in status.get("conditions") or () if item.get("type") == type_), None)


def is_true(status: Mapping[str, Any], type_: str) -> bool:
    """Return True if the status has the condition and it is True."""
    found = condition(status, type_)
    return found is not None and found.get("status") == "True"


def finished(status: Mapping[str, Any]) -> ConditionType | None:
    """Return how the job ended; None if it has not."""
    return next((type_ for type_ in _FINISHED if is_true(status, type_)), None)


class StatusDraft:
    """A new status, which starts as a copy of the current one."""

    def __init__(self, job: Job, now: dt.datetime) -> None:
        self._job = job
        self._now = now
        self.content: dict[str, Any] = copy.deepcopy(dict(job.status))
        self.content["observedGeneration"] = job.generation

    def set(self, type_: ConditionType, value: bool, reason: Reason, message: str = "") -> None:
        """Set a condition; its transition time changes only with its status."""
        set_condition(self.content, type_, value, reason, message, self._job.generation, self._now)

    def assess(self, true: ConditionType, reason: str, message: str) -> None:
        """Set Ready, Reconciling and Stalled, of which ``true`` is True."""
        for type_ in SUMMARY:
            set_condition(self.content, type_, type_ is true, reason, message, self._job.generation, self._now)

    def phase(self, phase: str, message: str = "") -> None:
        """Set the phase and the message for users."""
        self.content["phase"] = phase
        self._set_or_drop("message", message)

    def started(self) -> dt.datetime:
        """Set the start time unless it is set; return it."""
        known = parse_timestamp(self.content.get("startTime"))
        if known is None:
            known = self._now.replace(microsecond=0)
            self.content["startTime"] = timestamp(known)
        return known

    def reset_start(self) -> None:
        """Clear the start time: after a suspension the deadline starts again."""
        self.content.pop("startTime", None)

    def completed(self) -> None:
        """Set the completion time unless it is set."""
        self.content.setdefault("completionTime", timestamp(self._now))

    def forget_rounds(self) -> None:
        """Drop the results of training, whose volume is lost. The spent privacy budget stays."""
        for key in ("rounds", "metrics", "bestMetric", "model", "bestModel"):
            self.content.pop(key, None)

    def federation(self, spec: FederatedJobSpec, view: FederationView | None) -> None:
        """Take over the aggregator's report; values that it lacks stay."""
        rounds = dict(self.content.get("rounds") or {"current": 0, "completed": 0})
        rounds["total"] = spec.rounds
        if view is not None:
            # A restarted aggregator that still reads its checkpoint reports less than is known.
            rounds["completed"] = max(int(rounds.get("completed", 0)), view.completed_rounds)
            rounds["current"] = max(view.current_round, rounds["completed"])
            if view.metrics:
                self.content["metrics"] = [_metric(metric) for metric in sorted(view.metrics, key=lambda m: m.name)]
            if view.best is not None:
                self.content["bestMetric"] = _metric(view.best)
            for key, model in (("model", view.model), ("bestModel", view.best_model)):
                if model is not None:
                    uri = model_uri(self._job, spec, model.path)
                    self.content[key] = {"uri": uri, "round": model.round, "sha256": model.sha256}
            if (privacy := view.privacy) is not None and privacy.rounds >= self._accounted():
                epsilon, delta = rounded_up(privacy.epsilon), decimal(privacy.delta)
                self.content["privacy"] = {"epsilon": epsilon, "delta": delta, "rounds": privacy.rounds}
        self.content["rounds"] = rounds

    def secure(self, spec: FederatedJobSpec, view: FederationView | None) -> None:
        """Set the condition of secure aggregation, if the job has it; a report that is missing changes nothing."""
        settings, seen = spec.privacy.secure_aggregation, view.secure if view is not None else None
        if settings is None:
            return
        if seen is not None and (seen.message or seen.survivors):
            value, reason, message = _of_instance(seen)
            self.set(ConditionType.SECURELY_AGGREGATED, value, reason, message)
        elif condition(self.content, ConditionType.SECURELY_AGGREGATED) is None:
            message = "; ".join(settings.summary(spec.cohort))
            self.set(ConditionType.SECURELY_AGGREGATED, False, Reason.NO_SUM_YET, message)

    def _accounted(self) -> int:
        return int((self.content.get("privacy") or {}).get("rounds", 0))

    def pools(self, outcomes: Iterable[PoolOutcome], ready: Mapping[str, int] | None) -> None:
        """Set the pools. ``ready``: connected clients by pool; None if that is currently unknown."""
        before = {pool.get("name"): pool for pool in self.content.get("pools") or ()}
        shown: list[dict[str, Any]] = []
        for outcome in outcomes:
            known = int(before.get(outcome.name, {}).get("ready", 0))
            shown.append(
                {
                    "name": outcome.name,
                    "desired": outcome.desired,
                    "queued": outcome.queued,
                    "ready": known if ready is None else ready.get(outcome.name, 0),
                    "failed": outcome.failed,
                    **({"reason": outcome.reason} if outcome.reason else {}),
                    "jobs": outcome.jobs,
                    "attempt": outcome.attempt,
                }
            )
        self.content["pools"] = shown
        total, connected = sum(pool["desired"] for pool in shown), sum(pool["ready"] for pool in shown)
        self.content["clients"] = {"ready": connected, "total": total, "summary": f"{connected}/{total}"}

    def idle_pools(self) -> None:
        """Set the numbers of queued and connected clients to 0, and keep the rest."""
        for pool in self.content.get("pools") or ():
            pool["queued"] = pool["ready"] = 0
        clients = self.content.get("clients")
        if clients:
            clients["ready"] = 0
            clients["summary"] = f"0/{clients.get('total', 0)}"

    def _set_or_drop(self, key: str, value: str) -> None:
        if value:
            self.content[key] = value
        else:
            self.content.pop(key, None)


def _of_instance(seen: SecureView) -> tuple[bool, Reason, str]:
    if seen.message:
        return False, Reason.INSTANCE_FAILED, f"round {seen.round} is done again: {seen.message}"
    parts = [plural(seen.survivors, "survivor"), plural(seen.dropouts, "dropout")]
    parts.append(f"{seen.parties} {'party' if seen.parties == 1 else 'parties'}")
    if seen.clipped_ratio:
        parts.append(f"{seen.clipped_ratio:.2%} of the coordinates clipped")
    return True, Reason.SUM_OPENED, f"round {seen.round}: {', '.join(parts)}"


def set_condition(
    content: dict[str, Any], type_: str, value: bool, reason: str, message: str, generation: int, now: dt.datetime
) -> None:
    """Set one condition of a status."""
    entry = {
        "type": str(type_),
        "status": "True" if value else "False",
        "reason": str(reason),
        **({"message": message} if message else {}),
        "observedGeneration": generation,
        "lastTransitionTime": timestamp(now),
    }
    conditions = content.setdefault("conditions", [])
    for number, old in enumerate(conditions):
        if old.get("type") == type_:
            if old.get("status") == entry["status"] and old.get("lastTransitionTime"):
                entry["lastTransitionTime"] = old["lastTransitionTime"]
            conditions[number] = entry
            return
    conditions.append(entry)


def transitions(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the conditions of ``new`` whose status or reason differs from ``old``'s."""
    changed = []
    for item in new.get("conditions") or ():
        before = condition(old, item["type"])
        if before is None or (before.get("status"), before.get("reason")) != (item["status"], item["reason"]):
            changed.append(item)
    return changed


def merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON merge patch from ``old`` to ``new``; lists are replaced as a whole. Empty if they are equal."""
    patch: dict[str, Any] = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            inner = merge_patch(before, value)
            if inner:
                patch[key] = inner
        elif before != value or key not in old:
            patch[key] = value
    return patch


def is_urgent(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return True if a change must be written at once: a transition, rather than mere counters."""
    changed = bool(transitions(old, new)) or old.get("phase") != new.get("phase")
    return changed or _troubles(old) != _troubles(new)


def _troubles(status: Mapping[str, Any]) -> list[str]:
    """Return the headlines of the aggregator's and the pools' problems, whose changes cause events."""
    aggregator = condition(status, ConditionType.AGGREGATOR_READY) or {}
    words = [aggregator.get("message"), *(pool.get("reason") for pool in status.get("pools") or ())]
    return [headline(str(item or "")) for item in words]


def model_uri(job: Job, spec: FederatedJobSpec, path: str) -> str:
    """Return the URI of a model file: in the claim or, without one, in the aggregator's pod."""
    relative = path.removeprefix(STATE_DIR).lstrip("/")
    if spec.aggregator.checkpoint.storage == "PersistentVolumeClaim":
        return f"pvc://{job.namespace}/{names.checkpoints(job.name)}/{relative}"
    return f"pod://{job.namespace}/{names.aggregator(job.name)}{STATE_DIR}/{relative}"


def decimal(value: float) -> str:
    """Format a number as a short decimal string, since CRDs have no floats."""
    return f"{value:.{_DIGITS}g}"


def rounded_up(value: float) -> str:
    """Format a number that must not look smaller than it is, rounded up."""
    return decimal(float(Context(prec=_DIGITS, rounding=ROUND_CEILING).create_decimal_from_float(value)))


def _metric(metric: Metric) -> dict[str, Any]:
    return {"name": metric.name, "value": decimal(metric.value), "round": metric.round}
