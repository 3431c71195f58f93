"""Storage of the lab: a directory on this machine for every PersistentVolumeClaim of the class `lab`."""

from __future__ import annotations

import shutil
from pathlib import Path

from lab.kubernetes.api import Api, ApiError, Object, follow
from lab.machine.errors import say

CLASS_NAME = "lab"
PROVISIONER = "isthmus.dev/lab"

STORAGE_CLASS: Object = {
    "apiVersion": "storage.k8s.io/v1",
    "kind": "StorageClass",
    "metadata": {"name": CLASS_NAME, "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
    "provisioner": PROVISIONER,
    "reclaimPolicy": "Delete",
    "volumeBindingMode": "Immediate",
}


class Provisioner:
    """Provisioner of a directory and a volume for each pending claim; removes both with the claim."""

    def __init__(self, api: Api, directory: Path) -> None:
        self._api = api
        self._directory = directory

    def provision(self) -> None:
        follow(self._api, "/api/v1/persistentvolumeclaims", self._claims_changed)

    def reclaim(self) -> None:
        follow(self._api, "/api/v1/persistentvolumes", self._volumes_changed)

    def _claims_changed(self, claims: dict[tuple[str, str], Object]) -> None:
        for claim in claims.values():
            spec = claim["spec"]
            if (
                spec.get("storageClassName") == CLASS_NAME
                and claim["status"].get("phase") == "Pending"
                and not spec.get("volumeName")
                and spec.get("volumeMode", "Filesystem") == "Filesystem"
            ):
                self._provide(claim)

    def _provide(self, claim: Object) -> None:
        metadata, spec = claim["metadata"], claim["spec"]
        # The volume is named after the claim's uid, so that a repeated event creates no second one.
        name = f"pvc-{metadata['uid']}"
        directory = self._directory / name
        directory.mkdir(parents=True, exist_ok=True)
        # Any user in a pod can write: the kubelet does not chown hostPath volumes to fsGroup.
        directory.chmod(0o777)
        volume = {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name, "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER}},
            "spec": {
                "capacity": {"storage": spec["resources"]["requests"]["storage"]},
                "accessModes": spec["accessModes"],
                # Kubernetes itself deletes hostPath volumes only under /tmp: `reclaim` does it here.
                "persistentVolumeReclaimPolicy": "Retain",
                "storageClassName": CLASS_NAME,
                "claimRef": {
                    "apiVersion": "v1",
                    "kind": "PersistentVolumeClaim",
                    "namespace": metadata["namespace"],
                    "name": metadata["name"],
                    "uid": metadata["uid"],
                },
                "hostPath": {"path": str(directory), "type": "Directory"},
            },
        }
        try:
            self._api.post("/api/v1/persistentvolumes", volume)
        except ApiError as error:
            if error.status != 409:
                raise
        else:
            say(f"volume {name} for claim {metadata['namespace']}/{metadata['name']}")

    def _volumes_changed(self, volumes: dict[tuple[str, str], Object]) -> None:
        for volume in list(volumes.values()):
            annotations = volume["metadata"].get("annotations") or {}
            ours = annotations.get("pv.kubernetes.io/provisioned-by") == PROVISIONER
            if ours and volume.get("status", {}).get("phase") == "Released":
                name = volume["metadata"]["name"]
                try:
                    self._api.delete(f"/api/v1/persistentvolumes/{name}")
                except ApiError as error:
                    if error.status != 404:
                        raise
                shutil.rmtree(self._directory / name, ignore_errors=True)
                say(f"volume {name} removed")
