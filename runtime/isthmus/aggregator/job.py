"""The job file: what the operator (or the local runner) tells an aggregator."""

import json
from dataclasses import dataclass
from pathlib import Path

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.manifests.manifest import ManifestError, parse_spec


@dataclass(frozen=True)
class Job:
    """One FederatedJob, as its aggregator sees it."""

    name: str
    namespace: str
    uid: str
    spec: FederatedJobSpec


def load_job(path: Path) -> Job:
    """Reads ``{"name", "namespace", "uid", "spec"}``. Raises :class:`ManifestError`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        name, namespace, uid, spec = (data[key] for key in ("name", "namespace", "uid", "spec"))
    except OSError as error:
        raise ManifestError([f"{path}: {error.strerror}"]) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ManifestError([f"{path}: not a job file ({error})"]) from None
    return Job(name, namespace, uid, parse_spec(spec))
