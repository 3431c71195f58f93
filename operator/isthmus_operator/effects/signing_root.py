"""The cluster's root of secure aggregation, in a Secret of the operator's own namespace.

It is created once, when the first job or site needs it. The sites' admins write its public key to their policies, so a
new one would stop all jobs with secure aggregation there.
"""

import asyncio
import base64
import logging

from isthmus_contracts import identities as ids
from isthmus_contracts.wire.parties import PartyError, new_root, public_root

from ..state.parties import ClusterParty
from . import certificates
from .kube import Kube, KubeError

log = logging.getLogger(__name__)

KEY = "signing-root.key"
DEFAULT_NAME = "isthmus-signing-root"


class SigningRootError(Exception):
    """The root can be neither read nor created. ``str()`` is one line with the remedy."""


class SigningRoot:
    """The root, read or created at the first use."""

    def __init__(self, kube: Kube, party: str, namespace: str, name: str = DEFAULT_NAME) -> None:
        """``party``: the cluster's name. ``namespace``: of the Secret; empty if there is none."""
        self._kube = kube
        self._party = party
        self._namespace = namespace
        self._name = name
        self._known: ClusterParty | None = None
        self._one_at_a_time = asyncio.Lock()

    async def load(self) -> ClusterParty:
        """Return the cluster's party. Raises :class:`SigningRootError`, and :class:`KubeError` without an answer."""
        async with self._one_at_a_time:
            if self._known is None:
                self._known = await self._load()
            return self._known

    async def _load(self) -> ClusterParty:
        if not self._namespace:
            raise SigningRootError(
                "secure aggregation: the operator runs outside a cluster and has no place for its signing root: start"
                " it with --signing-root NAMESPACE/NAME"
            )
        where = f"Secret {self._namespace}/{self._name}"
        try:
            secret = await self._kube.get("Secret", self._namespace, self._name)
            if secret is None:
                secret = await self._create()
        except KubeError as error:
            if not error.definite:
                raise
            raise SigningRootError(f"secure aggregation: the operator cannot use its {where}: {error}") from None
        key = certificates.decoded(secret).get(KEY, b"")
        try:
            return ClusterParty(self._party, public_root(key), key)
        except PartyError as error:
            raise SigningRootError(
                f"secure aggregation: {where}: {KEY}: {error}; restore it from a backup, or delete it, so that a"
                " new one is created, and give its public key to the sites"
            ) from None

    async def _create(self) -> dict[str, object] | None:
        """Create the Secret; return it, or that of another operator that was quicker."""
        key, public = new_root()
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": self._name,
                "namespace": self._namespace,
                # No pod template may name a Secret with this label.
                "labels": {ids.LABEL_MANAGED_BY: ids.MANAGED_BY},
            },
            "type": "Opaque",
            "immutable": True,
            "data": {KEY: base64.b64encode(key).decode()},
        }
        try:
            created = await self._kube.create(body)
        except KubeError as error:
            if error.code != 409:
                raise
            return await self._kube.get("Secret", self._namespace, self._name)
        log.info(
            "made the signing root of party %s in Secret %s/%s: %s", self._party, self._namespace, self._name, public
        )
        return created
