"""What every layer shares: a missing component skips with a hint, or fails where nothing may be skipped."""

import os
from collections.abc import Callable

import pytest
from hypothesis import settings

# How long an example takes says more about what else the machine does.
settings.register_profile("isthmus", deadline=None)
settings.load_profile("isthmus")


@pytest.fixture(scope="session")
def require() -> Callable[[bool, str], None]:
    """``require(present, hint)``: skips the test unless ``present``; with ISTHMUS_REQUIRE_ALL=1 it fails instead."""

    def check(present: bool, hint: str) -> None:
        if not present:
            if os.environ.get("ISTHMUS_REQUIRE_ALL") == "1":
                pytest.fail(f"required component missing: {hint}", pytrace=False)
            pytest.skip(hint)

    return check
