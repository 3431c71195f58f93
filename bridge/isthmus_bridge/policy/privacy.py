"""The policy's ``privacy`` section: protection that jobs must have, and what may run here and leave the site."""

from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.secure_sums import FEWEST_CLIENTS
from isthmus_contracts.wire.parties import PartyName, PublicRoot, distinct_roots

from .fields import Line
from .parts import Part
from .program_digest import program_digest


def _text(value: object) -> object:
    # YAML reads hexadecimal digits as a number if they hold no letter, or one e.
    if isinstance(value, int | float):
        raise ValueError("must be a text; put it in quotes")
    return value


_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$"), BeforeValidator(_text)]
_ImageDigest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
_Root = Annotated[PublicRoot, BeforeValidator(_text)]


class SecureAggregationRules(Part):
    """Conditions under which the clients of this site take part in secure aggregation. They check these themselves."""

    required: bool = False
    """Deny jobs without ``privacy.secureAggregation``. Clients then refuse rounds without it, whatever the job's
    manifest says."""
    min_parties: Annotated[int, Field(ge=1, le=1000)] = 1
    """Least number of parties with distinct roots in a round: this site, other sites, and the cloud pools of each
    cluster. With 1, the clients of this site may be the only ones."""
    min_clients: Annotated[int, Field(ge=FEWEST_CLIENTS, le=1_000_000)] = FEWEST_CLIENTS
    """Least number of clients in a round."""
    roots: Annotated[dict[PartyName, _Root], AfterValidator(distinct_roots)] = {}
    """Public key of each other party's root, by the party's name. This site's own root is always trusted.
    ``isthmus-bridge root`` shows a site's."""


class DifferentialPrivacyRules(Part):
    """Bounds on ``privacy.differentialPrivacy`` of a job's manifest."""

    required: bool = False
    """Deny jobs without differential privacy. The other fields need it."""
    max_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Largest budget (``maxEpsilon``) that a job may state; a job without a budget is denied."""
    max_delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    min_noise_multiplier: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    distributed: bool = False
    """Demand ``noise: Distributed``: the clients add the noise. Otherwise the aggregator may, which sees the sum
    before."""

    @model_validator(mode="after")
    def _of_use(self) -> Self:
        for name in ("max_epsilon", "max_delta", "min_noise_multiplier", "distributed"):
            if getattr(self, name) not in (None, False) and not self.required:
                raise ValueError(f"{name} needs required: true; otherwise a job without differential privacy passes")
        return self


class PrivacyRules(Part):
    """Protection that jobs must have, and what may run here and leave the site."""

    secure_aggregation: SecureAggregationRules = SecureAggregationRules()
    differential_privacy: DifferentialPrivacyRules = DifferentialPrivacyRules()
    code_digests: list[_Digest] | None = None
    """SHA-256 of each program that may run: its command line, its variables and its files together, as
    ``isthmus-bridge digest`` prints it. Default: any program."""
    image_digests: list[_ImageDigest] | None = None
    """Digests (``sha256:…``) of the images that may run in environments that run the job's image. The job must name its
    image by digest, ``registry/name@sha256:…``. Default: any image that matches the environment's patterns."""
    tensors: Annotated[list[Annotated[Line, Field(max_length=512)]], Field(min_length=1)] = ["*"]
    """Patterns (``*``, ``?``) of the names of tensors that clients may send to the aggregator."""
    max_bytes_per_round: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    """Most bytes that one client may send in a round."""


def broken_rule(rules: PrivacyRules, spec: pb.PoolSpec, *, runs_image: bool) -> tuple[str, str] | None:
    """Return the first rule that a request breaks, by its path in the policy, and the message; ``None`` if none."""
    found = _secure(rules, spec) or _differential(rules.differential_privacy, spec.privacy)
    if found is not None:
        return found
    if rules.code_digests is not None and (digest := program_digest(spec)) not in rules.code_digests:
        return "privacy.code_digests", (
            f"the program (task.command, env and code) has the digest {digest}, which is not approved here"
        )
    if rules.image_digests is not None and runs_image:
        _, _, digest = spec.image.partition("@")
        if digest not in rules.image_digests:
            why = f"{digest!r} is not approved here" if digest else "needs a digest here: name it as IMAGE@sha256:…"
            return "privacy.image_digests", f"task.image {spec.image!r}: {why}"
    return None


def _secure(rules: PrivacyRules, spec: pb.PoolSpec) -> tuple[str, str] | None:
    if not rules.secure_aggregation.required or spec.privacy.secure_aggregation:
        return None
    why = "privacy.secureAggregation is not set in the manifest; this site takes no job without it"
    return "privacy.secure_aggregation.required", why


def _differential(rules: DifferentialPrivacyRules, stated: pb.Privacy) -> tuple[str, str] | None:
    section, field = "privacy.differential_privacy", "privacy.differentialPrivacy"
    if not rules.required:
        return None
    if not stated.noise_multiplier:
        return f"{section}.required", f"{field} is not set in the manifest; this site takes no job without it"
    if rules.distributed and not stated.distributed_noise:
        return f"{section}.distributed", f"{field}.noise is Aggregator; this site demands Distributed"
    if (least := rules.min_noise_multiplier) is not None and stated.noise_multiplier < least:
        why = f"{field}.noiseMultiplier is {stated.noise_multiplier:g}; at least {least:g}"
        return f"{section}.min_noise_multiplier", why
    if (most := rules.max_delta) is not None and stated.delta > most:
        return f"{section}.max_delta", f"{field}.delta is {stated.delta:g}; at most {most:g}"
    if (most := rules.max_epsilon) is not None and not 0 < stated.max_epsilon <= most:
        shown = f"{stated.max_epsilon:g}" if stated.max_epsilon else "not set"
        return f"{section}.max_epsilon", f"{field}.maxEpsilon is {shown}; at most {most:g}"
    return None
