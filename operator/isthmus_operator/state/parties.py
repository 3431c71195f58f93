"""The parties of secure aggregation: this cluster, and the sites that its jobs use."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from isthmus_contracts.api.hpc_site import HpcSiteSpec


@dataclass(frozen=True, slots=True)
class ClusterParty:
    """The party of all cloud pools of this cluster."""

    name: str
    root: str  # public key, 64 hexadecimal digits
    root_key: bytes = field(repr=False)  # PEM


@dataclass(frozen=True, slots=True)
class SiteParty:
    """A site's party."""

    name: str  # empty: the bridge has not reported one
    root: str  # likewise, unless the HPCSite's spec gives it


def site_party(spec: HpcSiteSpec | None, body: Mapping[str, Any]) -> SiteParty:
    """Return the party of an HPCSite. A root in its spec, from the admin, takes precedence over the reported one."""
    reported = (body.get("status") or {}).get("signing") or {}
    pinned = spec.signing_root if spec is not None else None
    return SiteParty(str(reported.get("party") or ""), pinned or str(reported.get("root") or ""))
