"""Settings of secure aggregation in a manifest, and the jobs that it refuses to protect."""

from copy import deepcopy
from typing import Any, get_args

import pytest

from isthmus_contracts.api.secure_aggregation import (
    FEWEST_STEPS,
    LINEAR,
    NOT_LINEAR,
    SecureAggregation,
    ring_steps,
)
from isthmus_contracts.api.strategy import Algorithm
from isthmus_contracts.identities import API_VERSION
from isthmus_contracts.manifests.manifest import ManifestError, parse_federated_job, parse_spec
from isthmus_contracts.secure_sums import FEWEST_CLIENTS, threshold

SPEC: dict[str, Any] = {
    "rounds": 10,
    "task": {"image": "img", "command": ["python"]},
    "pools": [{"name": "cloud", "replicas": 6, "cloud": {}}],
}
HERE = "spec.privacy.secureAggregation"
NAME = "privacy.secureAggregation"


def spec(secure: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    privacy = changes.pop("privacy", {})
    return deepcopy(SPEC) | {"privacy": {"secureAggregation": secure or {}, **privacy}} | changes


def cloud(replicas: int, name: str = "cloud", **more: Any) -> dict[str, Any]:
    return {"name": name, "replicas": replicas, "cloud": {}, **more}


def site(name: str, replicas: int) -> dict[str, Any]:
    return {"name": name, "replicas": replicas, "hpc": {"siteRef": {"name": name}, "environment": "py"}}


def problem(manifest: dict[str, Any]) -> str:
    with pytest.raises(ManifestError) as error:
        parse_spec(manifest)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_empty_mapping_switches_it_on_with_safe_defaults() -> None:
    parsed = parse_spec(spec())
    secure = parsed.privacy.secure_aggregation
    assert secure is not None
    assert (secure.bits, secure.clip, secure.keep, secure.rotation) == (32, None, None, False)
    assert (secure.min_parties, secure.min_clients, secure.phase_deadline_seconds) == (1, 3, 60)
    assert secure.metrics == {"loss": "100", "eval_loss": "100", "val_loss": "100", "accuracy": "1"}
    assert parse_spec(SPEC).privacy.secure_aggregation is None


def test_the_quorum_follows_the_least_number_of_clients() -> None:
    assert parse_spec(SPEC).min_clients == 2
    for secure, least in (({}, 3), ({"minClients": 5}, 5)):
        parsed = parse_spec(spec(secure))
        assert (parsed.min_clients, parsed.min_updates) == (least, least)


def test_bounds_are_added_to_the_default_ones() -> None:
    secure = parse_spec(spec({"metrics": {"f1": "1", "loss": "20"}})).privacy.secure_aggregation
    assert secure is not None
    assert secure.metrics == {"loss": "20", "eval_loss": "100", "val_loss": "100", "accuracy": "1", "f1": "1"}


@pytest.mark.parametrize("algorithm", LINEAR)
def test_linear_rules_go_with_it(algorithm: str) -> None:
    parse_spec(spec(strategy={"algorithm": algorithm}))


@pytest.mark.parametrize("algorithm", [name for name in get_args(Algorithm) if name not in LINEAR])
def test_other_rules_are_refused_with_a_reason(algorithm: str) -> None:
    strategy = {"algorithm": algorithm} | ({"class": "m:C"} if algorithm == "Custom" else {})
    said = problem(spec(strategy=strategy, stragglers={"minUpdates": 5 if "Krum" in algorithm else 1}))
    assert said.startswith(f"spec.strategy.algorithm: {algorithm} does not go with {NAME}: ")
    assert said.endswith("; use FedAvg, FedProx, FedAvgM, FedAdagrad, FedAdam, FedYogi, FedNova or SCAFFOLD")


def test_every_algorithm_is_declared_once() -> None:
    assert sorted([*LINEAR, *NOT_LINEAR]) == sorted(get_args(Algorithm))


@pytest.mark.parametrize("download", ["None", "Int8", "Float16+Zstd"])
def test_downloads_may_be_compressed(download: str) -> None:
    parse_spec(spec(compression={"download": download}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, "bits: must be one of 32, 16, not 8"),
        ({"bits": True}, "bits: must be 32 or 16"),
        ({"bits": "32"}, "bits: must be one of 32, 16, not '32'"),
        ({"clip": "0"}, "clip: must be above 0 and finite, not 0"),
        ({"clip": "1e999"}, "clip: must be above 0 and finite, not 1e999"),
        ({"clip": 0.1}, "clip: must be a string (put it in quotes), not 0.1"),
        ({"maxExamples": 0}, "maxExamples: must be at least 1, not 0"),
        ({"metrics": {"a b": "1"}}, "metrics: 'a b' is no name of a metric: letters, digits, _ . and -"),
        ({"metrics": {"f1": "0"}}, "metrics.f1: must be at least 1e-6 and at most 1e9, not 0"),
        ({"metrics": {"f1": "high"}}, "metrics.f1: 'high' is not a decimal number, in quotes"),
        ({"minClients": 2}, "minClients: must be at least 3, not 2"),
        ({"minClients": 7}, "minClients: 7 is more than the 6 clients of all pools; no sum could be opened"),
        (
            {"minParties": 2},
            "minParties: 2 parties must take part, and the pools belong to 1 (the cluster); add pools of other sites,"
            " or lower it",
        ),
        ({"phaseDeadlineSeconds": 0}, "phaseDeadlineSeconds: must be at least 1, not 0"),
        ({"keep": "1"}, "keep: must be above 0 and below 1, not 1; leave it out to send all coordinates"),
        (
            {"bits": 16},
            "maxExamples: 1000000 leaves no precision with bits 16: updates are scaled by examples / maxExamples; give"
            " the largest number of examples of a client, at most 100000, or use bits 32",
        ),
        (
            {"maxExamples": 10**12},
            "maxExamples: 1000000000000 examples of each of 6 clients, times 100 for the metric loss, exceed the range"
            " of masked sums; lower it to 14660155037 or less, or the metric's bound",
        ),
        ({"masks": "yes"}, "masks: unknown field"),
    ],
)
def test_a_bad_setting_is_one_line(settings: dict[str, Any], message: str) -> None:
    assert problem(spec(settings)) == f"{HERE}.{message}"


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (
            spec(pools=[cloud(2)]),
            f"spec.pools: {NAME} needs at least 3 clients that train, and there may be only 2: with two, each could"
            " compute the other's update from the sum; raise replicas",
        ),
        (
            spec(pools=[cloud(4) | {"cloud": {"minReplicas": 0}}, site("lumi", 2)]),
            f"spec.pools: {NAME} needs at least 3 clients that train, and there may be only 2: with two, each could"
            " compute the other's update from the sum; raise replicas or cloud.minReplicas",
        ),
        (
            spec(pools=[cloud(6), cloud(1, "eyes", role="Evaluate")]),
            f"spec.pools[1].role: Evaluate does not go with {NAME}: these clients' metrics would travel in clear; leave"
            " the pool out, since the clients that train measure each model as well",
        ),
        (
            spec(pools=[cloud(9), site("lumi", 1)]),
            "spec.pools: 9 of 10 clients belong to the cluster, whose shares (7 suffice) could open the others'"
            " updates, so the others would refuse; at most 6 of 10 may belong to one party",
        ),
        (
            spec({"minParties": 2}, pools=[cloud(2), site("lumi", 1)]),
            "spec.pools: site lumi has one client beside the cluster, which could subtract its own updates from the"
            " sum, so that client would refuse; raise its replicas, or add another site",
        ),
        (
            spec(strategy={"deterministic": True}),
            f"spec.strategy.deterministic: does not go with {NAME}, whose sums of integers do not depend on the order,"
            " and whose rounding is random; leave it out",
        ),
        (
            spec({"keep": "0.1"}, strategy={"algorithm": "SCAFFOLD"}),
            f"{HERE}.keep: does not go with SCAFFOLD, which needs each client's whole change at the server, as the"
            " client remembers it; leave it out",
        ),
        (
            spec(selection={"policy": "Adaptive"}),
            f"spec.selection.policy: Adaptive does not go with {NAME}: it uses the clients' losses, which stay secret;"
            " use All or Random",
        ),
        (
            spec(selection={"minClients": 2}),
            f"spec.selection.minClients: 2 is too few for {NAME}, which opens sums of at least 3 clients; raise it to"
            " 3, or leave it out",
        ),
        (
            spec(selection={"minClients": 6}, stragglers={"minUpdates": 3}),
            f"spec.stragglers.minUpdates: 3 is too few for {NAME}: of 6 clients (selection.minClients), more than two"
            " thirds and at least 3 must hand in; raise it to 5, or leave it out",
        ),
        (
            spec(selection={"policy": "Random", "fraction": "0.5", "overSelect": "1"}),
            f"spec.selection.overSelect: 1 is too much for {NAME}: of the 6 clients of a round 5 must hand in, and the"
            " round would end with 3; lower it",
        ),
        (
            spec(stragglers={"late": "Fold"}),
            f"spec.stragglers.late: Fold does not go with {NAME}: a late update is masked for its own round; use"
            " Discard",
        ),
        *(
            (
                spec(compression={"upload": upload}),
                f"spec.compression.upload: {upload} does not go with {NAME}: {why}",
            )
            for upload, why in (
                (
                    "TopK+Int8",
                    f"the positions depend on the data and are sent in clear; use {NAME}.keep, which draws them at"
                    " random",
                ),
                (
                    "Rotation+Int4",
                    f"the scales of Int4 depend on the data and are sent in clear; use {NAME}.bits 16 or keep",
                ),
                (
                    "BFloat16+Zstd",
                    f"masked updates are integers, which BFloat16 does not hold; use {NAME}.bits 16 or keep",
                ),
                (
                    "Zstd",
                    f"masked updates are random numbers, which no codec makes smaller; use {NAME}.bits 16 or keep",
                ),
            )
        ),
        (
            spec({"bits": 16, "maxExamples": 100}, pools=[cloud(64)]),
            f"{HERE}.bits: 16 is too small for 64 clients, as it suits at most 32; use 32",
        ),
        (
            spec(objective={"metric": "f1"}),
            f'{HERE}.metrics: has no bound for objective.metric, f1; add its largest absolute value, such as f1: "1"',
        ),
    ],
)
def test_a_job_that_cannot_be_protected_is_refused_in_one_line(manifest: dict[str, Any], message: str) -> None:
    assert problem(manifest) == message


@pytest.mark.parametrize(
    "manifest",
    [
        spec({"minParties": 2}, pools=[cloud(2), site("lumi", 2)]),
        spec({"minParties": 3}, pools=[site("lumi", 1), site("juwels", 1), cloud(1)]),
        spec({"bits": 16, "maxExamples": 60_000}, pools=[cloud(32)]),
        spec(pools=[cloud(40_000)]),
        spec({"keep": "0.05", "rotation": True, "clip": "1e-3"}),
        spec({"metrics": {"f1": "1"}}, objective={"metric": "f1"}),
        spec(selection={"policy": "Random", "fraction": "0.5", "overSelect": "0.3"}),
        spec(selection={"minClients": 6}, stragglers={"minUpdates": 5}),
    ],
)
def test_what_goes_with_it(manifest: dict[str, Any]) -> None:
    parse_spec(manifest)


@pytest.mark.parametrize("clients", range(FEWEST_CLIENTS, 200))
def test_the_threshold_leaves_no_two_disjoint_sets_of_survivors(clients: int) -> None:
    # Two sets above two thirds share more than a third of the clients, so an honest one is in both.
    assert 2 * threshold(clients) - clients > clients / 3
    assert threshold(clients) <= clients


@pytest.mark.parametrize(("bits", "clients"), [(16, 3), (16, 32), (32, 1000), (32, 2_000_000)])
def test_a_sum_of_largest_values_does_not_wrap_around(bits: int, clients: int) -> None:
    assert ring_steps(bits, clients) >= FEWEST_STEPS
    assert ring_steps(bits, clients) * clients < 2 ** (bits - 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 16, "maxExamples": 1000}, "bits: does not go with privacy.differentialPrivacy: 16 leaves no room"),
        ({"rotation": True}, "rotation: does not go with privacy.differentialPrivacy: "),
        ({"keep": "0.1"}, "keep: does not go with privacy.differentialPrivacy: "),
    ],
)
def test_noise_needs_the_whole_ring_and_all_coordinates(settings: dict[str, Any], message: str) -> None:
    noise = {"clipNorm": "1", "noiseMultiplier": "1", "delta": "1e-6"}
    parse_spec(spec(privacy={"differentialPrivacy": noise}))
    assert problem(spec(settings, privacy={"differentialPrivacy": noise})).startswith(f"{HERE}.{message}")


@pytest.mark.parametrize("value", [True, "on", 1])
def test_a_switch_is_answered_with_the_mapping_to_write(value: object) -> None:
    assert problem(SPEC | {"privacy": {"secureAggregation": value}}) == (
        f"{HERE}: must be a mapping, not {value!r}; {{}} switches it on with safe defaults"
    )


@pytest.mark.parametrize(
    ("field", "way"), [("secureAggregation", "write {} to switch it on"), ("differentialPrivacy", "give its settings")]
)
def test_protection_without_a_value_is_no_job_without_protection(field: str, way: str) -> None:
    manifest = {"apiVersion": API_VERSION, "kind": "FederatedJob", "metadata": {"name": "demo"}}
    with pytest.raises(ManifestError) as error:
        parse_federated_job(manifest | {"spec": SPEC | {"privacy": {field: None}}})
    assert str(error.value) == f"spec.privacy.{field}: is empty; {way}, or leave the field out"
    # The accepted spec, as it is stored, has such fields.
    stored = parse_spec(SPEC).model_dump(mode="json", by_alias=True)
    assert stored["privacy"] == {"differentialPrivacy": None, "secureAggregation": None}
    assert parse_spec(stored) == parse_spec(SPEC)


def test_noise_of_clients_must_fit_into_the_ring() -> None:
    noise = {"clipNorm": "1", "noiseMultiplier": "100000", "delta": "1e-6", "noise": "Distributed"}
    parse_spec(spec(privacy={"differentialPrivacy": noise}))
    # Where few clients are enough, each adds more noise, and all of them may come.
    few = {"pools": [cloud(1000)], "selection": {"minClients": 5}}
    assert problem(spec(privacy={"differentialPrivacy": noise}, **few)) == (
        "spec.privacy.differentialPrivacy.noiseMultiplier: 100000 is too much noise of 1000 clients for 32 bits"
        " (privacy.secureAggregation); lower it, or use noise: Aggregator"
    )


def test_an_undeclared_algorithm_is_refused() -> None:
    strategy = parse_spec(SPEC).strategy.model_copy(update={"algorithm": "FedNew"})
    said = SecureAggregation()._rule_problem(strategy)
    assert said is not None
    assert "FedNew does not go with privacy.secureAggregation: it is not known to need only sums" in said


def test_the_summary_names_the_threshold_and_the_parties() -> None:
    parsed = parse_spec(spec(pools=[cloud(4), site("lumi", 4)], selection={"policy": "Random", "fraction": "0.5"}))
    assert SecureAggregation().summary(parsed.cohort) == [
        "of 4 clients in a round at least 4 must hand in; only their sum is opened",
        "parties: the cluster (4), site lumi (4)",
        "it protects from a curious aggregator; if a site's policy demands two parties, also from the cluster's admin",
    ]
    alone = SecureAggregation().summary(parse_spec(spec(pools=[site("lumi", 4)])).cohort)
    assert alone[1:] == [
        "all clients belong to one party, site lumi",
        "it protects from a curious aggregator only, not from that party's admin",
    ]


@pytest.mark.parametrize("settings", [{"min_parties": 2}, None])
def test_a_name_that_the_api_server_drops_does_not_count(settings: dict[str, Any] | None) -> None:
    assert problem(spec(privacy={"secure_aggregation": settings})) == (
        "spec.privacy.secure_aggregation: unknown field; names are in camelCase: secureAggregation"
    )
