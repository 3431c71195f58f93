"""Privacy settings of a manifest, and the settings that they can be combined with."""

from copy import deepcopy
from typing import Any, get_args

import pytest

from isthmus_contracts.api.privacy import PROTECTED, UNPROTECTED, DifferentialPrivacy
from isthmus_contracts.api.strategy import Algorithm
from isthmus_contracts.manifests.manifest import ManifestError, parse_spec

SPEC: dict[str, Any] = {
    "rounds": 10,
    "task": {"image": "img", "command": ["python"]},
    "privacy": {"differentialPrivacy": {"clipNorm": "1.0", "noiseMultiplier": "2", "maxEpsilon": "8"}},
    "pools": [{"name": "cloud", "replicas": 6, "cloud": {}}, {"name": "eyes", "role": "Evaluate", "cloud": {}}],
}
HERE = "spec.privacy.differentialPrivacy"


def spec(private: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    manifest = deepcopy(SPEC) | changes
    manifest["privacy"]["differentialPrivacy"] |= private or {}
    return manifest


def test_a_good_one() -> None:
    private = parse_spec(spec()).privacy.differential_privacy
    assert private is not None
    assert (private.clip_norm, private.noise_multiplier) == ("1.0", "2")
    assert (private.delta, private.max_epsilon) == ("1e-5", "8")
    assert parse_spec(SPEC | {"privacy": {}}).privacy.differential_privacy is None


def test_distributed_noise_goes_with_masks() -> None:
    manifest = SPEC | {"pools": SPEC["pools"][:1]} | {"privacy": deepcopy(SPEC["privacy"]) | {"secureAggregation": {}}}
    manifest["privacy"]["differentialPrivacy"]["noise"] = "Distributed"
    assert parse_spec(manifest).privacy.secure_aggregation is not None


def test_clipping_that_follows_the_updates() -> None:
    private = parse_spec(spec({"adaptiveClipping": {"countNoise": "1.5"}})).privacy.differential_privacy
    assert private is not None
    adaptive = private.adaptive_clipping
    assert adaptive is not None
    assert (adaptive.quantile, adaptive.learning_rate, adaptive.count_noise) == ("0.5", "0.2", "1.5")


@pytest.mark.parametrize("algorithm", ["FedAvg", "FedProx", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"])
@pytest.mark.parametrize("upload", ["None", "Int8", "TopK+Int8", "Rotation+Int4+Zstd"])
def test_what_goes_with_it(algorithm: str, upload: str) -> None:
    parse_spec(spec(strategy={"algorithm": algorithm}, compression={"upload": upload}))


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (spec({"clipNorm": "0"}), f"{HERE}.clipNorm: must be above 0 and at most 100000, not 0"),
        *(
            (
                spec({name: value}),
                f"{HERE}.{name}: must be from 1.2e-38 to 3.4e+38 in size, which single precision holds, not {value}",
            )
            for name, value in (("clipNorm", "2.4e-299"), ("noiseMultiplier", "1e-40"))
        ),
        (spec({"noiseMultiplier": "-1"}), f"{HERE}.noiseMultiplier: must be above 0 and at most 100000, not -1"),
        (spec({"noiseMultiplier": 1.5}), f"{HERE}.noiseMultiplier: must be a string (put it in quotes), not 1.5"),
        (spec({"delta": "1"}), f"{HERE}.delta: must be at least 1e-15 and below 1, not 1"),
        (spec({"delta": "0.2"}), f"{HERE}.delta: 0.2 is not less than 1/6, one over the clients"),
        (spec({"maxEpsilon": "0"}), f"{HERE}.maxEpsilon: must be above 0 and finite, not 0"),
        (
            spec({"maxEpsilon": "0.5"}),
            f"{HERE}.maxEpsilon: 0.5 does not pay for one round, which costs 1.993 with noiseMultiplier 2 and delta"
            " 1e-5; raise noiseMultiplier",
        ),
        (spec({"clipping": "Flat"}), f"{HERE}.clipping: unknown field"),
        (SPEC | {"privacy": {"differentialPrivacy": {"clipNorm": "1"}}}, f"{HERE}.noiseMultiplier: is missing"),
        (SPEC | {"privacy": {"encryption": {}}}, "spec.privacy.encryption: unknown field"),
        (
            spec({"noise": "Distributed"}),
            f"{HERE}.noise: Distributed needs privacy.secureAggregation, as a client's share of the noise does not"
            " protect its update alone; add secureAggregation: {}, or use Aggregator",
        ),
        (spec({"noise": "Both"}), f"{HERE}.noise: must be one of Aggregator, Distributed, not 'Both'"),
        *(
            (spec({"adaptiveClipping": {field: value}}), f"{HERE}.adaptiveClipping.{field}: {why}, not {value}")
            for field, value, why in (
                ("quantile", "1", "must be above 0 and below 1"),
                ("learningRate", "0", "must be above 0 and at most 1"),
                ("countNoise", "-1", "must be above 0 and at most 100000"),
            )
        ),
        (
            spec({"adaptiveClipping": {"countNoise": "1"}}),
            f"{HERE}.adaptiveClipping.countNoise: 1 is not more than half of noiseMultiplier, 2, so the count alone"
            " would cost more than a round may",
        ),
        (
            spec(strategy={"algorithm": "Krum"}, stragglers={"minUpdates": 5}),
            f"{HERE}: does not go with Krum, which compares single updates: noise is added to their sum; use FedAvg,"
            " FedProx, FedAvgM, FedAdagrad, FedAdam or FedYogi",
        ),
        (
            spec(strategy={"algorithm": "SCAFFOLD"}),
            f"{HERE}: does not go with SCAFFOLD, which shares the clients' gradients beside their updates; use FedAvg,"
            " FedProx, FedAvgM, FedAdagrad, FedAdam or FedYogi",
        ),
        (
            spec(strategy={"deterministic": True}),
            "spec.strategy.deterministic: does not go with privacy.differentialPrivacy, whose noise must be random",
        ),
        *(
            (
                spec(**change),
                f"{HERE}: does not go with {what}: one client's data must not decide whose updates count, or how often",
            )
            for change, what in (
                ({"stragglers": {"late": "Fold"}}, "stragglers.late Fold"),
                ({"selection": {"policy": "Adaptive"}}, "selection.policy Adaptive"),
                ({"selection": {"policy": "Random", "overSelect": "0.3"}}, "selection.overSelect"),
            )
        ),
    ],
)
def test_a_bad_one_is_one_line(manifest: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError) as error:
        parse_spec(manifest)
    assert str(error.value) == message


@pytest.mark.parametrize("algorithm", ["FedNova", "QFedAvg", "FedDyn", "FedBuff", "FedAsync", "TrimmedMean"])
def test_other_rules_are_refused_with_a_reason(algorithm: str) -> None:
    with pytest.raises(ManifestError, match=rf"differentialPrivacy: does not go with {algorithm}, (in )?which .*; use"):
        parse_spec(spec(strategy={"algorithm": algorithm}))


def test_every_algorithm_is_declared_once() -> None:
    assert sorted([*PROTECTED, *UNPROTECTED]) == sorted(get_args(Algorithm))


def test_an_undeclared_algorithm_is_refused() -> None:
    private = DifferentialPrivacy.model_validate({"clipNorm": "1", "noiseMultiplier": "1"})
    assert private.problem("FedNew", 10) == (  # type: ignore[arg-type]
        "differentialPrivacy: does not go with FedNew, which is not known to use only the noisy mean of the updates;"
        " use FedAvg, FedProx, FedAvgM, FedAdagrad, FedAdam or FedYogi"
    )


@pytest.mark.parametrize(
    ("selection", "expected"),
    [({}, 6), ({"policy": "Random", "fraction": "0.4"}, 3), ({"policy": "Random", "fraction": "0.1"}, 2)],
)
def test_how_many_updates_a_round_is_expected_to_have(selection: dict[str, str], expected: int) -> None:
    assert parse_spec(spec(selection=selection)).expected_updates == expected
