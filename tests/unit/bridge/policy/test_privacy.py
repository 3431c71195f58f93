"""The policy's privacy section: what it denies, and which sections are faulty."""

from pathlib import Path
from typing import Any

import pytest

from isthmus_bridge.policy.authorization import Denial, Grant, decide
from isthmus_bridge.policy.policy import PolicyError
from isthmus_bridge.policy.program_digest import digest_of, program_digest
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.wire.parties import new_root
from tests.support.fake_slurm import policy, spec

ROOT, OTHER = (new_root()[1] for _ in range(2))
PRIVATE = pb.Privacy(secure_aggregation=True, noise_multiplier=1.0, delta=1e-6, max_epsilon=4)
BOUNDS = {"required": True, "max_epsilon": 8, "max_delta": 1e-5, "min_noise_multiplier": 0.5}
IMAGE = "registry.example/train@sha256:" + "ab" * 32


def decided(root: Path, rules: dict[str, Any], **changes: object) -> Grant | Denial:
    site = policy(root, privacy=rules)
    return decide(site, site.identities[0], spec(**changes))


def altered(**changes: Any) -> pb.Privacy:
    stated = pb.Privacy()
    stated.CopyFrom(PRIVATE)
    for name, value in changes.items():
        setattr(stated, name, value)
    return stated


def test_without_rules_nothing_is_demanded(tmp_path: Path) -> None:
    assert isinstance(decided(tmp_path, {}), Grant)


def test_a_job_that_meets_every_rule_is_granted(tmp_path: Path) -> None:
    rules = {
        "secure_aggregation": {"required": True, "min_parties": 2, "roots": {"cloud": ROOT}},
        "differential_privacy": BOUNDS,
        "code_digests": [program_digest(spec())],
        "image_digests": ["sha256:" + "cd" * 32],  # the environment runs no image of the job
    }
    assert isinstance(decided(tmp_path, rules, privacy=PRIVATE), Grant)


@pytest.mark.parametrize(
    ("rules", "privacy", "message"),
    [
        (
            {"secure_aggregation": {"required": True}}, altered(secure_aggregation=False),
            "policy privacy.secure_aggregation.required: privacy.secureAggregation is not set in the manifest; this"
            " site takes no job without it",
        ),
        (
            {"differential_privacy": {"required": True}}, pb.Privacy(),
            "policy privacy.differential_privacy.required: privacy.differentialPrivacy is not set in the manifest; this"
            " site takes no job without it",
        ),
        (
            {"differential_privacy": BOUNDS | {"distributed": True}}, PRIVATE,
            "policy privacy.differential_privacy.distributed: privacy.differentialPrivacy.noise is Aggregator; this"
            " site demands Distributed",
        ),
        (
            {"differential_privacy": BOUNDS}, altered(noise_multiplier=0.4),
            "policy privacy.differential_privacy.min_noise_multiplier: privacy.differentialPrivacy.noiseMultiplier is"
            " 0.4; at least 0.5",
        ),
        (
            {"differential_privacy": BOUNDS}, altered(delta=1e-4),
            "policy privacy.differential_privacy.max_delta: privacy.differentialPrivacy.delta is 0.0001; at most 1e-05",
        ),
        (
            {"differential_privacy": BOUNDS}, altered(max_epsilon=10),
            "policy privacy.differential_privacy.max_epsilon: privacy.differentialPrivacy.maxEpsilon is 10; at most 8",
        ),
        (
            {"differential_privacy": BOUNDS}, altered(max_epsilon=0),
            "policy privacy.differential_privacy.max_epsilon: privacy.differentialPrivacy.maxEpsilon is not set; at"
            " most 8",
        ),
    ],
)  # fmt: skip
def test_a_denial_names_the_rule_and_the_field(
    tmp_path: Path, rules: dict[str, Any], privacy: pb.Privacy, message: str
) -> None:
    assert str(decided(tmp_path, rules, privacy=privacy)) == message


def test_only_approved_programs_run(tmp_path: Path) -> None:
    approved = {"code_digests": [program_digest(spec(code={"train.py": b"good"}))]}
    assert isinstance(decided(tmp_path, approved, code={"train.py": b"good"}), Grant)
    for changes in (
        {"code": {"train.py": b"bad"}},
        {"code": {"other.py": b"good"}},
        {"code": {"train.py": b"good", "sitecustomize.py": b""}},
        {"code": {"train.py": b"good"}, "command": ["python3", "-c", "bad"]},
        {"code": {"train.py": b"good"}, "env": {"PYTHONSTARTUP": "/tmp/bad.py"}},  # noqa: S108
    ):
        digest = program_digest(spec(**changes))
        assert str(decided(tmp_path, approved, **changes)) == (
            "policy privacy.code_digests: the program (task.command, env and code) has the digest"
            f" {digest}, which is not approved here"
        )


def test_the_digest_of_a_program_is_documented() -> None:
    # printf '{"code":{"a.py":"%s"},"command":["python3","a.py"],"env":{"A":"1"}}' "$(sha256sum <a.py | cut -c-64)" |
    #   sha256sum
    assert digest_of(["python3", "a.py"], {"A": "1"}, {"a.py": b"x = 1\n"}) == (
        "f6ff5d3263a3cfdb8d7162461287a3bc1fb2557e338c4af4c267c08e19e3e169"
    )


def test_only_approved_images_run(tmp_path: Path) -> None:
    environments = {"own": {"prefix": ["run", "{image}"], "images": ["registry.example/*"]}}
    site = policy(
        tmp_path, privacy={"image_digests": ["sha256:" + "ab" * 32]}, environments=environments, partitions=[]
    )

    def decision(image: str) -> Grant | Denial:
        return decide(site, site.identities[0], spec(environment="own", image=image))

    assert isinstance(decision(IMAGE), Grant)
    assert str(decision("registry.example/train:1")) == (
        "policy privacy.image_digests: task.image 'registry.example/train:1': needs a digest here: name it as"
        " IMAGE@sha256:…"
    )
    other = "registry.example/train@sha256:" + "cd" * 32
    assert "is not approved here" in str(decision(other))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"secure": {}}, "privacy.secure: unknown field"),
        ({"secure_aggregation": {"min_clients": 2}}, "privacy.secure_aggregation.min_clients: "),
        ({"secure_aggregation": {"min_parties": 0}}, "privacy.secure_aggregation.min_parties: "),
        ({"secure_aggregation": {"roots": {"a": "ab"}}}, "secure_aggregation.roots.a: 'ab' is not a public key"),
        ({"secure_aggregation": {"roots": {"a": int("1" * 64)}}}, "roots.a: must be a text; put it in quotes"),
        ({"secure_aggregation": {"roots": {"a": "00" * 32}}}, "anybody could sign for it"),
        ({"secure_aggregation": {"roots": {"a": ROOT, "b": ROOT}}}, "a and b have the same root"),
        ({"secure_aggregation": {"roots": {"a b": ROOT}}}, "privacy.secure_aggregation.roots.a b"),
        ({"differential_privacy": {"max_epsilon": 8}}, "differential_privacy: max_epsilon needs required: true"),
        ({"differential_privacy": {"distributed": True}}, "differential_privacy: distributed needs required: true"),
        ({"differential_privacy": {"required": True, "max_epsilon": 0}}, "privacy.differential_privacy.max_epsilon: "),
        ({"differential_privacy": {"required": True, "max_delta": 1}}, "privacy.differential_privacy.max_delta: "),
        ({"code_digests": ["AB" * 32]}, "privacy.code_digests[0]: "),
        ({"code_digests": ["ab" * 32 + "\n"]}, "privacy.code_digests[0]: "),
        ({"image_digests": ["ab" * 32]}, "privacy.image_digests[0]: "),
        ({"tensors": []}, "privacy.tensors: "),
        ({"tensors": ["a\nb"]}, "privacy.tensors[0]: "),
        ({"max_bytes_per_round": 0}, "privacy.max_bytes_per_round: "),
    ],
)  # fmt: skip
def test_a_faulty_section_is_refused_in_one_line(tmp_path: Path, rules: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        policy(tmp_path, privacy=rules)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
