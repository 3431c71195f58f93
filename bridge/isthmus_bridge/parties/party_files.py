"""Files for secure aggregation beside the TLS certificate of a pool's clients: signing key, credential and trust."""

from isthmus_contracts.identities import TRUST_FILE
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.wire.parties import PartyError, Trust, issue, party_files

from ..policy.policy import Policy
from . import signing_root


def trust(policy: Policy, own: str, job: pb.Privacy) -> Trust:
    """Return the conditions of a pool's clients: the stricter of the policy's and the job's.

    ``own``: public key of the site's root; empty if there is none. ``job``: what the job's manifest asks for. Its
    clients enforce that themselves, since the aggregator might leave it out.

    Raises :class:`PartyError`, which names the field of the policy.
    """
    rules = policy.privacy
    secure, private = rules.secure_aggregation, rules.differential_privacy
    roots = dict(secure.roots)
    section = "privacy.secure_aggregation.roots"
    if own:
        if roots.get(policy.site, own) != own:
            raise PartyError(f"{section}.{policy.site}: is not this site's root, which is {own}; leave it out")
        if twin := next((party for party, root in roots.items() if root == own and party != policy.site), None):
            raise PartyError(f"{section}.{twin}: is the root of this site, {policy.site}; leave it out")
        roots[policy.site] = own
    noise = [private.min_noise_multiplier or 0.0] if private.distributed else []
    noise += [job.noise_multiplier] if job.distributed_noise else []
    return Trust(
        roots=roots,
        min_parties=max(secure.min_parties, job.min_parties),
        min_clients=max(secure.min_clients, job.min_clients),
        required=secure.required or job.secure_aggregation,
        noise_multiplier=max(noise, default=None),
        tensors=list(rules.tensors),
        max_bytes_per_round=rules.max_bytes_per_round,
    )


def for_new_pool(policy: Policy, spec: pb.PoolSpec) -> dict[str, bytes]:
    """Return the files by name, with a fresh signing key.

    A site without a root gives its clients the trust file only, and only if the policy has a ``privacy`` section.
    Raises :class:`PartyError` and ``OSError``.
    """
    root = signing_root.read(policy.tls_dir)
    if root is None:
        if spec.privacy.secure_aggregation or policy.privacy.secure_aggregation.required:
            missing = policy.tls_dir / signing_root.KEY_FILE
            raise PartyError(
                f"this site has no root for secure aggregation ({missing}); `isthmus-bridge certs` creates it"
            )
        return _trust_file(policy, "", spec)
    signing_key, credential = issue(root, policy.site, spec.job_uid, spec.pool)
    return party_files(signing_key, credential, trust(policy, signing_root.public(policy.tls_dir), spec.privacy))


def renewed(policy: Policy, spec: pb.PoolSpec) -> dict[str, bytes]:
    """Return the trust file by its name, for a pool that has its signing key. Raises as :func:`for_new_pool`."""
    return _trust_file(policy, signing_root.public(policy.tls_dir), spec)


def _trust_file(policy: Policy, own: str, spec: pb.PoolSpec) -> dict[str, bytes]:
    if not own and "privacy" not in policy.model_fields_set:
        return {}
    return {TRUST_FILE: trust(policy, own, spec.privacy).serialized()}
