"""Removal of finished pools after their retention, and of credentials and directories that are no longer needed."""

import logging
import re
import time

from ..files.run_directory import PATTERN_KEY, claimed
from ..policy.policy import Policy
from ..users.directory import owner
from ..users.pool_directory import pool_directory
from .audit_events import Auditor
from .departures import DepartureCollector
from .journal import Journal
from .submitter import forget_credentials

log = logging.getLogger(__name__)


def clean_up(policy: Policy, journal: Journal, auditor: Auditor, now: float) -> None:
    """Remove what is due. Failures are logged, since they must not stop the bridge."""
    departures = DepartureCollector(policy, auditor, time.monotonic)
    for entry in journal.finished_before(now + 1):
        if _holds_credentials(policy, entry.key, entry.user):
            # The bridge died before it could remove them at the end of the pool, and collect the clients' last lines.
            departures.collect(entry, last=True)
            forget_credentials(policy, entry.key, entry.user)
    for entry in journal.finished_before(now - policy.retention_days * 86400):
        try:
            pool_directory(policy, entry.key, entry.user).remove()
        except OSError as error:
            log.error("cannot remove the pool's directory: %s", error, extra={"key": entry.key})
            continue
        journal.delete(entry.key)
        log.info("pool removed after its retention", extra={"key": entry.key})
    _remove_unrecorded(policy, journal, now)


def _remove_unrecorded(policy: Policy, journal: Journal, now: float) -> None:
    """Remove the directories of requests that were never recorded: they hold credentials, and no job came of them."""
    for path in policy.run_dir.iterdir():
        if re.fullmatch(PATTERN_KEY, path.name) is None or not claimed(path) or journal.get(path.name) is not None:
            continue
        try:
            run = pool_directory(policy, path.name, owner(path))
            # A request that is about to be recorded has a minute. With a script, the pool may have been submitted.
            if run.holds_credentials() and path.stat().st_mtime < now - 60 and not run.submitted():
                run.remove()
                log.info("removed the directory of an unrecorded request", extra={"key": path.name})
        except OSError as error:
            log.error("cannot remove %s: %s", path, error, extra={"key": path.name})


def _holds_credentials(policy: Policy, key: str, user: str) -> bool:
    try:
        return pool_directory(policy, key, user).holds_credentials()
    except OSError:
        return False
