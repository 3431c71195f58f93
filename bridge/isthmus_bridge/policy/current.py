"""The policy in force. It can be replaced while the bridge runs, as long as only rules have changed."""

from .policy import Policy, PolicyError

# Settings with which the running bridge was built.
_FIXED = (
    "site", "run_dir", "journal", "audit_log", "tls_dir", "listen", "gateways", "metrics_listen", "relay", "slurm",
    "users",
)  # fmt: skip


class CurrentPolicy:
    """Holder of the policy. Threads may read it at any time; each decision is made under one policy."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._policy

    def replace(self, policy: Policy) -> list[str]:
        """Put another policy in force and return the names of the fields that differ.

        Raises :class:`PolicyError` if a changed field needs a restart; then nothing changes.
        """
        fields = [name for name in Policy.model_fields if getattr(policy, name) != getattr(self._policy, name)]
        if fixed := [name for name in fields if name in _FIXED]:
            raise PolicyError(f"{', '.join(fixed)}: changes only with a restart; the old policy stays in force")
        self._policy = policy
        return fields
