"""The documentation names every condition and reason, and none that does not exist."""

import re
from pathlib import Path

from isthmus_contracts.api.federated_job_status import ConditionType, Reason

TEXT = (Path(__file__).parents[3] / "docs" / "operating" / "operator.md").read_text(encoding="utf-8")
STATUS = TEXT.split("\n## Status\n", 1)[1].split("\n## What happens when", 1)[0]


def test_every_condition_and_reason_is_documented() -> None:
    assert [name for name in (*ConditionType, *Reason) if f"`{name}`" not in STATUS] == []


def test_every_documented_condition_exists() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (?:True|False)", STATUS, re.MULTILINE)
    assert set(rows) <= set(ConditionType)
    reasons = re.findall(r"(?:True|False) ((?:`\w+`(?:, )?)+)", STATUS)
    assert {name for group in reasons for name in re.findall(r"`(\w+)`", group)} <= set(Reason)
