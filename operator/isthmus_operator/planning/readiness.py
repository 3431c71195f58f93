"""The conditions for generic tools: Ready, Reconciling and Stalled. Pure.

kstatus, which Flux and Helm use, treats Stalled as a failure, Reconciling as work in progress, and Ready as the wanted
state. Exactly one of the three is True, and all have the same reason and message.
"""

import datetime as dt
from collections.abc import Mapping
from typing import Any

from isthmus_contracts.api.federated_job_status import ConditionType, Reason

from .status import SUMMARY, StatusDraft, condition, finished, is_true, set_condition

# Reasons of an HPCSite that pass without a change of its manifest.
_PASSING = (Reason.SITE_UNREACHABLE, Reason.SITE_NOT_CONNECTED)


def assess_job(status: StatusDraft) -> None:
    """Set the three conditions from the rest of a job's status."""
    status.assess(*_of_job(status.content))


def assess_site(status: dict[str, Any], generation: int, now: dt.datetime) -> None:
    """Set the three conditions from an HPCSite's ``Reachable``."""
    reachable = condition(status, ConditionType.REACHABLE) or {}
    reason, message = str(reachable.get("reason") or Reason.PROGRESSING), str(reachable.get("message") or "")
    if reachable.get("status") == "True":
        true = ConditionType.READY
    else:
        true = ConditionType.RECONCILING if reason in _PASSING else ConditionType.STALLED
    for type_ in SUMMARY:
        set_condition(status, type_, type_ is true, reason, message, generation, now)


def _of_job(status: Mapping[str, Any]) -> tuple[ConditionType, str, str]:
    """Return which of the three is True, with its reason and message."""
    message = str(status.get("message") or "")
    ended, accepted = finished(status), condition(status, ConditionType.ACCEPTED) or {}
    if ended is not None:
        verdict = condition(status, ended) or {}
        true = ConditionType.READY if ended is ConditionType.COMPLETE else ConditionType.STALLED
        return true, str(verdict.get("reason")), str(verdict.get("message") or "")
    if accepted.get("status") == "False":
        return ConditionType.STALLED, str(accepted.get("reason")), str(accepted.get("message") or "")
    if is_true(status, ConditionType.SUSPENDED):
        # The message names what is still to be stopped.
        true = ConditionType.RECONCILING if message else ConditionType.READY
        return true, Reason.SUSPENDED, message
    if status.get("phase") == "Running":
        return ConditionType.READY, Reason.TRAINING, message
    return ConditionType.RECONCILING, Reason.PROGRESSING, message
