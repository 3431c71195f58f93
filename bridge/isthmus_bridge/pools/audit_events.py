"""The bridge's own records in the site's audit log: submissions that it accepted and denied, and their ends."""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.text import one_line

from ..audit.denials import DenialLimit
from ..audit.log import AuditLog, Record
from ..policy.authorization import Denial
from ..policy.policy import Policy
from ..policy.program_digest import program_digest
from .journal import Entry, State

log = logging.getLogger(__name__)

_LONGEST = 400


def nothing_relayed(server_name: str) -> tuple[int, int]:
    """Return the bytes that a bridge without a relay has forwarded."""
    return 0, 0


class Auditor:
    """Writer of the records. Thread-safe."""

    def __init__(
        self,
        audit_log: AuditLog,
        monotonic: Callable[[], float] = time.monotonic,
        relayed: Callable[[str], tuple[int, int]] = nothing_relayed,
    ) -> None:
        """``relayed``: returns the bytes that the relay has forwarded for a server name since the last call, to the
        aggregator and to the clients."""
        self._log = audit_log
        self._monotonic = monotonic
        self._relayed = relayed
        self._limit = DenialLimit()
        self._lock = threading.Lock()

    def accepted(self, caller: str, key: str, spec: pb.PoolSpec, user: str) -> None:
        """Record that the policy allows a pool. Raises ``OSError``: without a record nothing is submitted."""
        privacy = {name.name: value for name, value in spec.privacy.ListFields()}
        self._log.append(
            "accepted", caller=caller, **_pool(key, spec), attempt=spec.attempt, replicas=spec.replicas, user=user,
            environment=spec.environment, image=spec.image, data_set=spec.data_ref, program=program_digest(spec),
            privacy=privacy,
        )  # fmt: skip

    def denied(
        self, caller: str, denial: Denial, *, key: str = "", job: str = "", pool: str = "", transient: bool = False
    ) -> None:
        """Record a denial, unless the same one was recorded recently, or too many were."""
        with self._lock:
            omitted = self._limit.admit((caller, key, denial), self._monotonic())
        if omitted is None:
            return
        fields: dict[str, Any] = {
            "caller": caller, "key": key, "job": job, "pool": pool, "rule": denial.rule,
            "message": one_line(denial.message, _LONGEST),
        }  # fmt: skip
        if transient:
            fields["transient"] = True
        if omitted:
            fields["omitted_before"] = omitted
        self._append("denied", fields)

    def ended(self, entry: Entry, state: State, message: str) -> None:
        """Record the end of a pool, with the bytes that the relay forwarded for its job since the last such record."""
        spec = entry.pool_spec()
        fields = {**_pool(entry.key, spec), "state": str(state), "slurm_job": entry.array_id}
        if spec.federation.via_bridge:
            up, down = self._relayed(spec.federation.server_name)
            fields |= {"relayed_to_aggregator": up, "relayed_to_clients": down}
        self._append("ended", {**fields, "message": one_line(message, _LONGEST)})
        # The bridge's log often goes to another machine, where this hash shows later whether lines were removed.
        head = self._log.head
        log.info("audit log: record %d", head.number, extra={"key": entry.key, "audit_hash": head.hash})

    def policy_in_force(self, policy: Policy, changed: Sequence[str] = ()) -> None:
        """Record the policy under which the bridge decides from now on. ``changed``: fields that a reload changed."""
        content = policy.model_dump_json(exclude_unset=True).encode()
        fields: dict[str, Any] = {"site": policy.site, "sha256": hashlib.sha256(content).hexdigest()}
        self._append("policy", fields | ({"changed": list(changed)} if changed else {}))

    def left(self, records: Sequence[Record]) -> None:
        """Append records of what left, which clients reported. Raises ``OSError``."""
        self._log.extend(records)

    def _append(self, event: str, fields: dict[str, Any]) -> None:
        try:
            self._log.append(event, **fields)
        except OSError as error:
            # What happened cannot be undone, and pools must be able to end on a full disk.
            log.error("cannot write the audit log: %s", error.strerror, extra={"event": event})


def _pool(key: str, spec: pb.PoolSpec) -> dict[str, Any]:
    return {"key": key, "job": f"{spec.namespace}/{spec.job}", "job_uid": spec.job_uid, "pool": spec.pool}
