"""The trust file of a job's cloud clients: the roots of all its parties. Pure."""

from collections.abc import Mapping

from pydantic import ValidationError

from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.wire.parties import PartyError, Trust, parse_public

from ..state.parties import SiteParty


class TrustError(ValueError):
    """Reason why a job's clients cannot trust each other yet, after the field. An admin can resolve it."""


def needs_trust(spec: FederatedJobSpec) -> bool:
    """Return True if the operator makes signing keys for the job: it has cloud pools and secure aggregation."""
    return spec.privacy.secure_aggregation is not None and any(pool.cloud is not None for pool in spec.pools)


def trust_of(spec: FederatedJobSpec, party: str, root: str, sites: Mapping[str, SiteParty]) -> Trust:
    """Return the trust of a job's cloud clients.

    ``party``, ``root``: of this cluster; ``sites``: by HPCSite. A site's own clients get theirs from their site.
    Raises :class:`TrustError`.
    """
    secure = spec.privacy.secure_aggregation
    assert secure is not None
    roots = {party: root}
    owners = {root: "this cluster"}
    for number, pool in enumerate(spec.pools):
        if pool.hpc is None:
            continue
        name = pool.hpc.site_ref.name
        field, site = f"spec.pools[{number}].hpc.siteRef.name", sites.get(name, SiteParty("", ""))
        if not site.name or not site.root:
            raise TrustError(
                f"{field}: HPCSite {name!r} has no signing root, which secure aggregation needs: the site's admin makes"
                " one with isthmus-bridge certs, and its bridge reports it"
            )
        owner = owners.get(site.root)
        if owner is not None and roots.get(site.name) == site.root:
            continue  # another pool, or another HPCSite, of the same site
        if owner is not None or site.name in roots:
            whose = owner or ("this cluster" if site.name == party else "another HPCSite")
            what = "signing root" if owner is not None else f"party name {site.name!r}"
            raise TrustError(f"{field}: HPCSite {name!r} has the same {what} as {whose}; they could not be told apart")
        try:
            parse_public(site.root)
        except PartyError as error:
            raise TrustError(f"{field}: HPCSite {name!r}: signing root: {error}") from None
        roots[site.name], owners[site.root] = site.root, f"HPCSite {name!r}"
    try:
        return Trust(
            roots=roots,
            min_parties=secure.min_parties,
            min_clients=secure.min_clients,
            required=True,
            noise_multiplier=spec.clients_noise_multiplier,
        )
    except ValidationError as error:
        wrong = ".".join(map(str, error.errors()[0]["loc"]))
        raise TrustError(f"secure aggregation: {wrong[:80]!r} is no name of a party, as it was configured") from None
