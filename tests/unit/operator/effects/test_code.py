"""Tests of task.code: the path of a user's files to the clients."""

import base64
import datetime as dt
from typing import Any

from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_operator.effects.code import copy, files_of
from isthmus_operator.planning import actions as act
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.render import aggregator
from isthmus_operator.render.client import ClientPods
from isthmus_operator.state.observed import Refusal
from tests.support.fake_cluster import NOW, World, job, of_kind, plan, spec, standing


def wanted(**changes: Any) -> dict[str, Any]:
    task = {"image": "i", "command": ["python", "t.py"], "code": {"configMapRef": {"name": "mine"}}}
    return spec(task=task, **changes)


def test_a_copy_is_immutable_and_the_jobs_own() -> None:
    source = {"data": {"t.py": "print()"}, "binaryData": {"w": base64.b64encode(b"\0\1").decode()}}
    made = copy(job(), "mine", source)
    assert isinstance(made, dict)
    assert (made["metadata"]["name"], made["immutable"]) == ("demo-code", True)
    assert files_of(made) == {"t.py": b"print()", "w": b"\0\1"}


def test_what_cannot_be_copied_names_the_field() -> None:
    missing = copy(job(), "mine", None)
    assert missing == "spec.task.code.configMapRef.name: there is no ConfigMap 'mine' in namespace team"
    for data in ({}, {"..x": "1"}, {"-rf": "1"}, {"x": "y" * 1_100_000}):
        refused = copy(job(), "mine", {"data": data})
        assert isinstance(refused, str)
        assert refused.startswith("spec.task.code: ConfigMap 'mine': ")


def test_files_lie_in_the_working_directory_of_every_pod() -> None:
    parsed = parse_spec(wanted())
    for pod in (
        ClientPods(job(), parsed, parsed.pools[0], "", ("net.py", "t.py")).pod(0, 0),
        aggregator.pod(job(), parsed, "", ("net.py", "t.py")),
    ):
        mounts = {item["mountPath"]: item for item in pod["spec"]["containers"][0]["volumeMounts"]}
        assert mounts["/work/t.py"]["subPath"] == "t.py"
        assert mounts["/work/net.py"]["readOnly"] is True
        assert "readOnly" not in mounts["/work"]
        assert {"name": "isthmus-code", "configMap": {"name": "demo-code"}} in pod["spec"]["volumes"]


def test_nothing_starts_without_the_files() -> None:
    base = standing(wanted())
    observed = standing(wanted(), present=base.present - {"ConfigMap/demo-code"})
    decided = plan(job(wanted()), observed, NOW, PlanOptions())
    assert of_kind(decided, act.CopyCode) == [act.CopyCode("mine", "demo-code")]
    assert not of_kind(decided, act.CreatePod)
    observed = standing(
        wanted(),
        present=base.present - {"ConfigMap/demo-code"},
        refusals={
            "ConfigMap/demo-code": Refusal(
                "spec.task.code.configMapRef.name: there is no", NOW + dt.timedelta(seconds=30), by_operator=True
            )
        },
    )
    decided = plan(job(wanted()), observed, NOW, PlanOptions())
    assert decided.status["message"] == "aggregator: spec.task.code.configMapRef.name: there is no"
    assert not of_kind(decided, act.CopyCode)


def test_the_site_is_asked_with_them() -> None:
    world = World(wanted(hpc=2))
    asked = [item for _ in range(12) for item in of_kind(world.step(), act.EnsurePool)]
    assert [item.code for item in asked] == ["demo-code"]
    world.run()
    assert world.condition("Complete") == "True/RoundsCompleted"
