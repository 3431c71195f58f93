"""Requests to the operator for a Slurm task's log."""

import json
from typing import Any

import pytest

from isthmus.cluster.api import ClusterError
from isthmus.cluster.logs import slurm_log


class Cluster:
    """Cluster that replies immediately, in a ConfigMap with these labels."""

    def __init__(self, **labels: str) -> None:
        self.labels = labels
        self.asked: dict[str, Any] = {}

    def annotate(self, job: str, annotations: dict[str, str]) -> None:
        self.asked = json.loads(annotations["isthmus.dev/log-request"])

    def get(self, kind: str, name: str) -> dict[str, Any]:
        assert (kind, name) == ("configmaps", "demo-log")
        return {"metadata": {"labels": self.labels}, "data": {"id": self.asked["id"], "log": "line\n"}}


def ask(cluster: Cluster) -> bytes:
    return b"".join(slurm_log(cluster, "demo", "lumi", 0, lines=0, follow=False))  # type: ignore[arg-type]


def test_the_operators_answer_is_shown() -> None:
    assert ask(Cluster(**{"isthmus.dev/job": "demo"})) == b"line\n"


def test_a_foreign_config_map_is_reported_at_once() -> None:
    with pytest.raises(ClusterError, match="the ConfigMap demo-log exists and does not belong to this job"):
        ask(Cluster())
