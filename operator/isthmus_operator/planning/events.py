"""The changes of a status that are worth a Kubernetes event: transitions, but not initial states."""

from collections.abc import Mapping
from typing import Any

from isthmus_contracts.api.federated_job_status import ConditionType, Reason

from .actions import Emit
from .status import SUMMARY, condition, transitions

_BAD = {
    Reason.INVALID_SPEC, Reason.TEMPLATE_NOT_ALLOWED, Reason.SITE_NOT_FOUND, Reason.SITE_NOT_ALLOWED,
    Reason.SIGNING_ROOT_MISSING, Reason.INSTANCE_FAILED,
    Reason.AGGREGATOR_LOST, Reason.AGGREGATOR_FAILED, Reason.QUORUM_IMPOSSIBLE, Reason.DEADLINE_EXCEEDED,
    Reason.QUEUE_TIMEOUT, Reason.POLICY_DENIED,
}  # fmt: skip
# For conditions whose own message is empty or too volatile for an event.
_WORDS = {
    Reason.VALID: "the manifest is accepted",
    Reason.AGGREGATOR_RUNNING: "the aggregator runs",
    Reason.SUSPENDED: "the job is suspended",
    Reason.NOT_SUSPENDED: "the job is resumed",
}


def transition_events(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Emit, ...]:
    """Return the events for the change from one status to the next."""
    events = [
        Emit(
            "Warning" if item["reason"] in _BAD else "Normal",
            item["reason"],
            _WORDS.get(item["reason"]) or item.get("message") or f"{item['type']} is {item['status']}",
        )
        for item in transitions(old, new)
        if _is_news(old, item)
    ]
    before, after = condition(old, ConditionType.ACCEPTED) or {}, condition(new, ConditionType.ACCEPTED) or {}
    # A change without effect: the condition stays True, and only its message changes.
    stays = before.get("status") == after.get("status") == "True"
    if stays and after.get("message") and after["message"] != before.get("message"):
        events.append(Emit("Warning", after["reason"], after["message"]))
    return tuple(events)


def _is_news(old: Mapping[str, Any], item: Mapping[str, Any]) -> bool:
    type_, reason = item["type"], item["reason"]
    if type_ in SUMMARY:
        # They summarize other conditions.
        return False
    if type_ == ConditionType.AGGREGATOR_READY:
        # Its end is reported by Complete, Failed or Suspended.
        return reason in (Reason.AGGREGATOR_RUNNING, Reason.AGGREGATOR_LOST)
    if type_ == ConditionType.QUORUM_REACHED:
        return bool(reason == Reason.ENOUGH_CLIENTS)
    if type_ == ConditionType.SUSPENDED:
        return condition(old, type_) is not None or item["status"] == "True"
    return True
