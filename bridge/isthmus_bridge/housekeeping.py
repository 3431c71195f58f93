"""What is thrown away: finished pools after their retention, credentials and directories that nothing needs."""

import logging
import re

from .journal import Journal
from .policy import Policy
from .requests import PATTERN_KEY
from .run_directory import RunDirectory
from .submitter import forget_credentials

log = logging.getLogger(__name__)


def keep_house(policy: Policy, journal: Journal, now: float) -> None:
    """One round. Failures are logged: nothing here may stop the bridge."""
    for entry in journal.finished_before(now + 1):
        if RunDirectory(policy.run_dir, entry.key).tls.exists():
            # The bridge died between a pool's end and this.
            forget_credentials(policy, entry.key)
    for entry in journal.finished_before(now - policy.retention_days * 86400):
        try:
            RunDirectory(policy.run_dir, entry.key).remove()
        except OSError as error:
            log.error("cannot remove the pool's directory: %s", error, extra={"key": entry.key})
            continue
        journal.delete(entry.key)
        log.info("forgotten", extra={"key": entry.key})
    _remove_unrecorded(policy, journal, now)


def _remove_unrecorded(policy: Policy, journal: Journal, now: float) -> None:
    """Directories of requests that were never recorded hold credentials, and never led to a job."""
    for path in policy.run_dir.iterdir():
        if re.fullmatch(PATTERN_KEY, path.name) is None or journal.get(path.name) is not None:
            continue
        run = RunDirectory(policy.run_dir, path.name)
        try:
            # A minute: a request that is about to be recorded is no leftover. A script: it may have been submitted.
            if run.tls.is_dir() and not run.script.exists() and path.stat().st_mtime < now - 60:
                run.remove()
                log.info("removed what an unrecorded request left", extra={"key": path.name})
        except OSError as error:
            log.error("cannot remove %s: %s", path, error, extra={"key": path.name})
