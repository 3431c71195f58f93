"""Lines about secure aggregation for the user of a local run."""

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.text import one_line

from .roster import counted


def introduction(spec: FederatedJobSpec) -> list[str]:
    """Return lines that say what is protected from whom in this run; none without secure aggregation."""
    secure = spec.privacy.secure_aggregation
    if secure is None:
        return []
    here = "this run makes all keys on this machine; on a cluster, each site makes those of its clients"
    return [f"secure aggregation: {line}" for line in (*secure.summary(spec.cohort), here)]


class InstanceFailures:
    """Failures of instances that were shown already."""

    def __init__(self) -> None:
        self._shown = 0

    def news(self, status: pb.FederationStatus) -> str:
        """Return one line about a failure since the last call, or an empty string."""
        secure = status.secure
        if secure.failed < self._shown:  # the aggregator was restarted, and counts from 0
            self._shown = 0
        if secure.failed == self._shown or not secure.message:
            return ""
        self._shown = secure.failed
        return f"secure aggregation is done again in round {secure.round}: {one_line(secure.message)}"


def result(status: pb.FederationStatus) -> str:
    """Return a line about the newest opened sum, or an empty string if there is none."""
    secure = status.secure
    if not status.HasField("secure") or not secure.survivors:
        return ""
    parts = [f"{counted(secure.survivors, 'update')} in the newest sum", counted(secure.dropouts, "dropout")]
    if secure.clipped_ratio:
        parts.append(f"{secure.clipped_ratio:.2%} of the coordinates clipped")
    if secure.failed:
        parts.append(f"{counted(secure.failed, 'instance')} failed")
    return f"secure aggregation: {', '.join(parts)}"
