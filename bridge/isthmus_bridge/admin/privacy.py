"""Explanation and checks of the policy's ``privacy`` section, and the digests that it names."""

import re
from collections.abc import Iterator
from pathlib import Path

from isthmus_contracts.manifests.code_files import check_files
from isthmus_contracts.manifests.manifest import ManifestError, load_code, load_federated_job
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.wire.parties import PartyError

from ..parties import party_files, signing_root
from ..policy.policy import Policy, PolicyError
from ..policy.privacy import DifferentialPrivacyRules, SecureAggregationRules
from ..policy.program_digest import digest_of

_BOUND_ELSEWHERE = re.compile(r"\{work_dir\}:(?!\{work_dir\})")


def explain(policy: Policy) -> Iterator[str]:
    """Yield lines that say what jobs must protect, what may run, and what may leave."""
    rules = policy.privacy
    yield "every job"
    yield from _secure(policy.site, rules.secure_aggregation)
    yield f"  {_differential(rules.differential_privacy)}"
    yield f"  may run {_approved(rules.code_digests, 'program', 'programs')}"
    if any(environment.runs_image for environment in policy.environments.values()):
        yield f"  may run {_approved(rules.image_digests, 'image', 'images')}"
    most = rules.max_bytes_per_round
    yield f"  may send the tensors {', '.join(rules.tensors)}, " + (
        f"at most {most} bytes for each client and round" if most else "any number of bytes"
    )
    yield f"  is recorded in {policy.audit_path}"


def _secure(site: str, rules: SecureAggregationRules) -> Iterator[str]:
    yield f"  {'must' if rules.required else 'may'} use secure aggregation; clients here then take part only"
    yield f"    in rounds of at least {rules.min_clients} clients and {_parties(rules.min_parties)}"
    yield f"    with clients of {', '.join([f'this site ({site})', *sorted(rules.roots)])}"


def _parties(least: int) -> str:
    return "1 party, which may be this site alone" if least == 1 else f"{least} parties"


def _differential(rules: DifferentialPrivacyRules) -> str:
    if not rules.required:
        return "may use differential privacy"
    bounds = {
        "maxEpsilon at most": rules.max_epsilon,
        "delta at most": rules.max_delta,
        "noiseMultiplier at least": rules.min_noise_multiplier,
    }
    stated = ["noise Distributed"] * rules.distributed
    stated += [f"{words} {value:g}" for words, value in bounds.items() if value is not None]
    return "must use differential privacy" + (f": {', '.join(stated)}" if stated else "")


def _approved(digests: list[str] | None, one: str, several: str) -> str:
    if digests is None:
        return f"any {one}"
    return f"{len(digests)} approved {one if len(digests) == 1 else several}"


def problems(policy: Policy) -> Iterator[str]:
    """Yield what makes the section unusable on this machine, one line each."""
    try:
        root = signing_root.public(policy.tls_dir)
        party_files.trust(policy, root, pb.Privacy())
    except PartyError as error:
        yield str(error)
        return
    except OSError as error:
        yield f"tls_dir: {error.filename}: {error.strerror}"
        return
    if not root and policy.privacy.secure_aggregation.required:
        missing = policy.tls_dir / signing_root.KEY_FILE
        yield (
            f"privacy.secure_aggregation.required: the site has no root ({missing}), so every job is denied;"
            " create it with `isthmus-bridge certs` and install it with the certificate"
        )


def warnings(policy: Policy) -> Iterator[str]:
    """Yield what is probably not meant, one line each."""
    rules = policy.privacy.secure_aggregation
    section = "privacy.secure_aggregation"
    others = [party for party in rules.roots if party != policy.site]
    if rules.required and rules.min_parties == 1:
        yield (
            f"{section}.min_parties: 1 protects against a curious aggregator only: whoever runs the cluster can add"
            " clients to a round and compute yours from the sum; 2 or more prevents it"
        )
    if rules.min_parties > len(others) + 1:
        yield (
            f"{section}.roots: holds {len(others)} other parties, so no round has {rules.min_parties}; add their"
            " roots, which `isthmus-bridge root` and the admins of the clusters show"
        )
    elif rules.required and not others:
        yield f"{section}.roots: is empty, so clients of this site train with each other only"
    for name, environment in sorted(policy.environments.items()):
        if environment.inside.work_dir is None and any(_BOUND_ELSEWHERE.search(one) for one in environment.prefix):
            yield (
                f"environments.{name}.inside.work_dir: is not set, but the prefix binds {{work_dir}} to another path;"
                " clients cannot write their audit file without it"
            )
    if policy.privacy.code_digests == []:
        yield "privacy.code_digests: is empty, so every job is denied; leave it out to allow any program"
    if policy.privacy.image_digests == []:
        yield "privacy.image_digests: is empty, so no job's own image runs; leave it out to allow any"


def require(policy: Policy) -> Policy:
    """Return the policy. Raises :class:`PolicyError` if its ``privacy`` section cannot be used."""
    if found := list(problems(policy)):
        raise PolicyError("; ".join(found))
    return policy


def root_line(policy: Policy) -> str:
    """Return this site's entry for ``roots`` in other policies. Raises :class:`PartyError` and ``OSError``."""
    root = signing_root.public(policy.tls_dir)
    if not root:
        missing = policy.tls_dir / signing_root.KEY_FILE
        raise PartyError(f"{missing} does not exist; `isthmus-bridge certs` creates it")
    return f'{policy.site}: "{root}"'


def digest_line(manifest: Path, folder: Path | None = None) -> str:
    """Return the digest of a manifest's program for ``code_digests``, with the job's name in a comment.

    ``folder``: holds the files of ``task.code``; by default, a ConfigMap in the manifest's file does. Raises
    ``ManifestError`` and ``OSError``.
    """
    job = load_federated_job(manifest)
    task = job.spec.task
    if folder is None:
        code = load_code(manifest, job)
    else:
        code = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        if problem := check_files(code):
            raise ManifestError([f"{folder}: {problem}"])
    digest = digest_of(task.command, {item.name: item.value for item in task.env}, code)
    return f'- "{digest}"  # {job.name}'
