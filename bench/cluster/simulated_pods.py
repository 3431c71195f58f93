"""Jobs whose pods fit no node, and a simulated kubelet that sets their status: many jobs in little time."""

import json
from collections.abc import Callable
from typing import Any

from isthmus_contracts import identities as ids

from .operator_process import Api

TEMPLATE: dict[str, Any] = {
    "spec": {"nodeSelector": {"isthmus.dev/no": "node"}, "terminationGracePeriodSeconds": 0},
}
_COMPLETE = json.dumps({"phase": "COMPLETE", "completedRounds": 3, "totalRounds": 3})


class Kubelet:
    """Simulated kubelet that reports each aggregator's training as complete, once."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api = api
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._told: set[str] = set()

    def complete(self, of: Callable[[str], bool]) -> None:
        """Complete the training of the existing aggregators, for jobs whose names are accepted."""
        # Version 0: read from the API server's cache.
        listed = self._api.read(f"{self._pods}?labelSelector={ids.LABEL_ROLE}%3Daggregator&resourceVersion=0")
        for pod in listed["items"]:
            uid, job = pod["metadata"]["uid"], pod["metadata"]["labels"][ids.LABEL_JOB]
            if uid not in self._told and of(job):
                self._told.add(uid)
                self._api.patch(f"{self._pods}/{pod['metadata']['name']}/status", {"status": _ended()})

    def forget(self) -> None:
        """Forget deleted pods."""
        self._told.clear()


def _ended() -> dict[str, Any]:
    state = {"exitCode": 0, "reason": "Completed", "message": _COMPLETE, "startedAt": None, "finishedAt": None}
    container = {
        "name": "aggregator", "image": "none", "imageID": "none", "ready": False, "restartCount": 0,
        "state": {"terminated": state},
    }  # fmt: skip
    return {"phase": "Succeeded", "containerStatuses": [container]}
