"""The policy that is in force: it can be replaced while the bridge runs, where only rules have changed."""

from .policy import Policy, PolicyError

# What the running bridge was built with.
_FIXED = ("site", "run_dir", "journal", "tls_dir", "listen", "gateways", "metrics_listen", "relay", "slurm", "users")


class Rules:
    """Holds the policy. Threads may read it at any time; each decision is taken under one policy."""

    def __init__(self, policy: Policy) -> None:
        self._current = policy

    @property
    def current(self) -> Policy:
        """The policy in force."""
        return self._current

    def replace(self, policy: Policy) -> list[str]:
        """Puts another policy in force and names what differs. Raises :class:`PolicyError`; then nothing changes."""
        fields = [name for name in Policy.model_fields if getattr(policy, name) != getattr(self._current, name)]
        if fixed := [name for name in fields if name in _FIXED]:
            raise PolicyError(f"{', '.join(fixed)}: changes only with a restart; the old policy stays in force")
        self._current = policy
        return fields
