"""The documentation names every condition and reason, and none that does not exist."""

import re
from pathlib import Path

from isthmus_contracts.api.federated_job_status import ConditionType, Reason

TEXT = (Path(__file__).parents[3] / "docs" / "operating" / "operator" / "status.md").read_text(encoding="utf-8")
STATUS = TEXT.split("\n## Status\n", 1)[1]
ROW = re.compile(r"^\| `(\w+)` \| (?:True|False) \| ([^|]*)\|", re.MULTILINE)


def test_every_condition_and_reason_is_documented() -> None:
    assert [name for name in (*ConditionType, *Reason) if f"`{name}`" not in STATUS] == []


def test_every_documented_condition_exists() -> None:
    rows = ROW.findall(STATUS)
    assert rows and {condition for condition, _ in rows} <= set(ConditionType)
    lists = [reasons for _, reasons in rows if "the reason of" not in reasons]
    assert {name for reasons in lists for name in re.findall(r"`(\w+)`", reasons)} <= set(Reason)
