"""Tables of ``isthmus status``."""

import io
from typing import Any

import pytest
from rich.console import Console

from isthmus.cluster.tables import job_view


def shown(private: dict[str, str], privacy: dict[str, Any] | None) -> str:
    pools = [{"name": "cloud", "replicas": 2, "cloud": {}}]
    spec = {"rounds": 9, "pools": pools, "privacy": {"differentialPrivacy": private}}
    status = {"phase": "Running", "rounds": {"completed": 3, "total": 9}, **({"privacy": privacy} if privacy else {})}
    console = Console(file=io.StringIO(), width=120)
    console.print(job_view({"metadata": {"name": "digits"}, "spec": spec, "status": status}))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("private", "line"),
    [
        ({"maxEpsilon": "8"}, "privacy: epsilon 2.131 of 8 (delta 1e-05)"),
        ({}, "privacy: epsilon 2.131 (delta 1e-05)"),
    ],
)
def test_the_privacy_budget_in_the_table(private: dict[str, str], line: str) -> None:
    assert line in shown(private, {"epsilon": "2.131", "delta": "1e-05", "rounds": 3}).splitlines()


def test_the_models_that_can_be_fetched() -> None:
    status = {"model": {"round": 9}, "bestModel": {"round": 4}}
    console = Console(file=io.StringIO(), width=120)
    console.print(job_view({"metadata": {"name": "digits"}, "spec": {"rounds": 9}, "status": status}))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "model of round 9: isthmus model get digits" in lines
    assert "best model, of round 4: isthmus model get --best digits" in lines


def test_a_job_without_says_nothing_of_it() -> None:
    assert "privacy" not in shown({}, None)


@pytest.mark.parametrize("state", ["True", "False"])
def test_the_state_of_secure_aggregation(state: str) -> None:
    message = "7 survivors, 1 dropout in round 3"
    conditions = [{"type": "SecurelyAggregated", "status": state, "reason": "SumOpened", "message": message}]
    console = Console(file=io.StringIO(), width=120)
    job = {"metadata": {"name": "digits"}, "spec": {"rounds": 9}, "status": {"conditions": conditions}}
    console.print(job_view(job))
    assert f"secure aggregation: {message}" in console.file.getvalue().splitlines()  # type: ignore[attr-defined]
