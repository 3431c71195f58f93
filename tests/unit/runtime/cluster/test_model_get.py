"""``isthmus model get`` with a fake cluster."""

import hashlib
from pathlib import Path
from typing import Any, cast

import pytest

from isthmus.cluster.api import Cluster, ClusterError
from isthmus.cluster.model import get_model

FILES = {
    "/var/lib/isthmus/model.safetensors": b"of the last round",
    "/var/lib/isthmus/checkpoints/round-000004.safetensors": b"of the best",
}


def described(path: str, number: int) -> dict[str, Any]:
    content = FILES[f"/var/lib/isthmus/{path}"]
    return {"uri": f"pvc://team/job-checkpoints/{path}", "round": number, "sha256": hashlib.sha256(content).hexdigest()}


class Fake:
    def __init__(self, **status: Any) -> None:
        self.status = status

    def job(self, name: str) -> dict[str, Any]:
        return {"metadata": {"name": name}, "spec": {"objective": {"metric": "f1"}}, "status": self.status}

    def get(self, kind: str, name: str) -> dict[str, Any]:
        return {"status": {"phase": "Running"}}

    def read_file(self, pod: str, container: str, path: str) -> bytes:
        return FILES[path]


def fetched(cluster: Fake, target: Path, *, best: bool) -> bytes:
    return get_model(cast(Cluster, cluster), "job", target, print, best=best).read_bytes()


def test_the_last_and_the_best(tmp_path: Path) -> None:
    best = described("checkpoints/round-000004.safetensors", 4)
    cluster = Fake(model=described("model.safetensors", 9), bestModel=best)
    assert fetched(cluster, tmp_path / "a", best=False) == b"of the last round"
    assert fetched(cluster, tmp_path / "b", best=True) == b"of the best"


def test_a_job_that_has_no_best_model_yet(tmp_path: Path) -> None:
    cluster = Fake(model=described("model.safetensors", 9))
    with pytest.raises(ClusterError, match="job job has no best model: most of its clients have not reported f1"):
        fetched(cluster, tmp_path / "a", best=True)
