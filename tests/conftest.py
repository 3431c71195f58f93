"""Fixtures and hooks for all tests: a missing component skips with a hint, or fails where nothing may be skipped."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: an example's duration depends mostly on the load of the machine.
settings.register_profile("isthmus", deadline=None)
settings.load_profile("isthmus")


@pytest.fixture(scope="session")
def require() -> Callable[[bool, str], None]:
    """Return ``require(present, hint)``, which skips the test unless ``present``.

    With ISTHMUS_REQUIRE_ALL=1 it fails the test instead.
    """

    def check(present: bool, hint: str) -> None:
        if not present:
            if os.environ.get("ISTHMUS_REQUIRE_ALL") == "1":
                pytest.fail(f"required component missing: {hint}", pytrace=False)
            pytest.skip(hint)

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Add the reason of each skipped test to the file that tests/run.sh sums up."""
    file = os.environ.get("ISTHMUS_SKIPPED")
    if not file or "PYTEST_XDIST_WORKER" in os.environ:  # a worker's reports reach the process that began it
        return
    reasons = [reason_of(report) for report in terminalreporter.stats.get("skipped", [])]
    with Path(file).open("a") as lines:
        lines.write("".join(f"{reason}\n" for reason in reasons))


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why a test, or a whole file of tests, was skipped, in one line."""
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return " ".join(said.removeprefix("Skipped: ").split())
