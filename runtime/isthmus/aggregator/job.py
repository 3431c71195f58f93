"""Job file, which the operator or the local runner writes for an aggregator."""

import json
from dataclasses import dataclass
from pathlib import Path

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.manifests.manifest import ManifestError, parse_spec


@dataclass(frozen=True)
class Job:
    """The part of a FederatedJob that its aggregator needs."""

    name: str
    namespace: str
    uid: str
    spec: FederatedJobSpec


def load_job(path: Path) -> Job:
    """Read ``{"name", "namespace", "uid", "spec"}``. Raise :class:`ManifestError`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        name, namespace, uid, spec = (data[key] for key in ("name", "namespace", "uid", "spec"))
    except OSError as error:
        raise ManifestError([f"{path}: {error.strerror}"]) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ManifestError([f"{path}: not a job file ({error})"]) from None
    return Job(name, namespace, uid, parse_spec(spec))
