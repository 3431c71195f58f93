"""Bad manifests: one line names the field and how to correct it."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from isthmus_contracts.api.tracking import PATTERN_TRACKING_URI, MLflow
from isthmus_contracts.manifests.manifest import ManifestError, load_federated_job, parse_federated_job, parse_spec

GOOD: dict[str, Any] = {
    "apiVersion": "isthmus.dev/v1alpha1",
    "kind": "FederatedJob",
    "metadata": {"name": "digits"},
    "spec": {
        "rounds": 2,
        "task": {"image": "img", "command": ["python", "-m", "x"]},
        "pools": [
            {"name": "cloud", "replicas": 2, "cloud": {}},
            {"name": "site", "replicas": 2, "hpc": {"siteRef": {"name": "lumi"}, "environment": "isthmus"}},
        ],
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    manifest = deepcopy(GOOD)
    *parents, last = path.split(".")
    target: Any = manifest
    for part in parents:
        target = target.setdefault(part, {}) if isinstance(target, dict) else target[int(part)]
    if value is KeyError:
        del target[last]
    elif isinstance(target, list):
        target[int(last)] = value
    else:
        target[last] = value
    return manifest


def test_defaults() -> None:
    job = parse_federated_job(GOOD)
    assert (job.name, job.namespace) == ("digits", "default")
    assert (job.spec.total_clients, job.spec.min_clients, job.spec.min_updates) == (4, 2, 2)
    assert job.spec.first_client("site") == 2
    assert job.spec.strategy.algorithm == "FedAvg"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("spec.rounds", 0, "spec.rounds: must be at least 1, not 0"),
        ("spec.rounds", "many", "spec.rounds: must be a whole number, not 'many'"),
        ("spec.rounds", KeyError, "spec.rounds: is missing"),
        ("spec.round", 1, "spec.round: unknown field"),
        ("spec.strategy", {"algorithm": "FedMagic"},
         "spec.strategy.algorithm: must be one of FedAvg, FedProx, "),
        ("spec.strategy", {"algorithm": "FedProx", "parameters": {"mu": "a lot"}},
         "spec.strategy.parameters.mu: 'a lot' is not a decimal number, in quotes"),
        ("spec.strategy", {"algorithm": "FedProx", "parameters": {"mu": "-1"}},
         "spec.strategy.parameters.mu: must be at least 0, not -1"),
        ("spec.strategy", {"algorithm": "FedProx", "parameters": {"mu": 0.1}},
         "spec.strategy.parameters.mu: must be a string (put it in quotes), not 0.1"),
        ("spec.strategy", {"algorithm": "FedAdam", "parameters": {"beta1": "1"}},
         "spec.strategy.parameters.beta1: must be below 1, not 1"),
        ("spec.strategy", {"algorithm": "FedYogi", "parameters": {"tau": "0"}},
         "spec.strategy.parameters.tau: must be above 0, not 0"),
        ("spec.strategy", {"algorithm": "FedAvgM", "parameters": {"learningRate": "1e999"}},
         "spec.strategy.parameters.learningRate: must be finite, not 1e999"),
        *(("spec.strategy", {"algorithm": algorithm, "parameters": {name: value}},
           f"spec.strategy.parameters.{name}: must be from 1.2e-38 to 3.4e+38 in size, which single precision holds,"
           f" not {value}")
          for algorithm, name, value in [
              ("FedAdam", "tau", "1e-46"), ("FedYogi", "tau", "1e-400"), ("FedAdagrad", "learningRate", "3.5e38"),
              ("FedAvgM", "learningRate", "1e300"), ("FedDyn", "alpha", "2e-39"),
              ("GeometricMedian", "smoothing", "1e-320"),
              ("FedProx", "mu", "1e39"), ("QFedAvg", "q", "1e-40"), ("SCAFFOLD", "learningRate", "0.0001E-40"),
          ]),
        ("spec.strategy", {"algorithm": "TrimmedMean", "parameters": {"trim": "0.5"}},
         "spec.strategy.parameters.trim: must be below 0.5, not 0.5"),
        ("spec.strategy", {"algorithm": "MultiKrum", "parameters": {"keep": "1.5"}},
         "spec.strategy.parameters.keep: must be a whole number, not 1.5"),
        ("spec.strategy", {"algorithm": "Custom"}, "spec.strategy.class: is missing; Custom needs module:Class"),
        ("spec.strategy", {"algorithm": "Custom", "class": "os.system"},
         "spec.strategy.class: 'os.system' is not of the form module:Class"),
        ("spec.strategy", {"algorithm": "Custom", "class": "a:B", "parameters": {"x": "1e999"}},
         "spec.strategy.parameters.x: must be finite, not 1e999"),
        ("spec.strategy", {"class": "a:B"}, "spec.strategy.class: goes with the algorithm Custom, not with FedAvg"),
        ("spec.strategy", {"algorithm": "Krum"},
         "spec.stragglers.minUpdates: 2 is too few for Krum, which needs 5 updates (2 byzantine + 3)"),
        ("spec.strategy", {"algorithm": "FedAvg", "parameters": {"mu": "1"}},
         "spec.strategy.parameters.mu: unknown for FedAvg; it takes none"),
        ("spec.pools.0.hpc", {"siteRef": {"name": "x"}, "environment": "e"},
         "spec.pools[0]: pool 'cloud' has both cloud and hpc; give exactly one of them"),
        ("spec.pools.0", {"name": "cloud"},
         "spec.pools[0]: pool 'cloud' has neither cloud nor hpc; give exactly one of them"),
        ("spec.pools.1.name", "cloud", "spec.pools[1].name: 'cloud' is taken; each pool needs its own name"),
        ("spec.pools.1.name", "observer", "spec.pools[1].name: 'observer' is reserved"),
        ("spec.pools", [], "spec.pools: needs at least 1 item(s)"),
        ("spec.selection", {"overSelect": "0.3"},
         "spec.selection.overSelect: goes with the policies Random and Adaptive; All selects every client anyway"),
        ("spec.selection", {"policy": "Adaptive", "exploration": "2"},
         "spec.selection.exploration: must be at least 0 and at most 1, not 2"),
        ("spec.stragglers", {"stalenessExponent": "-1"},
         "spec.stragglers.stalenessExponent: must be at least 0 and at most 10, not -1"),
        ("spec.strategy", {"algorithm": "FedAsync", "parameters": {"mixing": "1.5"}},
         "spec.strategy.parameters.mixing: must be at most 1, not 1.5"),
        ("spec.strategy", {"algorithm": "FedAsync", "deterministic": True},
         "spec.strategy.deterministic: which updates a round gets must not depend on speed, as strategy.algorithm"),
        ("spec.task.configChanges", [{"fromRound": 2, "config": {}}, {"fromRound": 2, "config": {}}],
         "spec.task.configChanges: two changes begin in round 2; merge them into one"),
        ("spec.selection", {"minClients": 5},
         "spec.selection.minClients: 5 is more than the 4 clients of all pools; it could never start"),
        ("spec.stragglers", {"minUpdates": 9},
         "spec.stragglers.minUpdates: 9 is more than the 4 clients of all pools; no round could end"),
        ("spec.selection", {"fraction": "1.5"}, "spec.selection.fraction: must be above 0 and at most 1, not 1.5"),
        ("spec.task.env", [{"name": "ISTHMUS_POOL"}],
         "spec.task.env[0].name: names that begin with ISTHMUS_ are reserved for Isthmus"),
        ("spec.pools.1.hpc.partition", "-x; rm", "spec.pools[1].hpc.partition: '-x; rm' does not match"),
        ("metadata.name", "Digits!", "metadata.name: 'Digits!' is not lower-case letters"),
        ("metadata.name", "x" * 51, "metadata.name: 51 characters are too many"),
        ("kind", "Job", "kind: must be FederatedJob, not 'Job'"),
        ("apiVersion", "v1", "apiVersion: must be isthmus.dev/v1alpha1, not 'v1'"),
    ],
)  # fmt: skip
def test_one_line_names_the_field(path: str, value: Any, message: str) -> None:
    with pytest.raises(ManifestError) as error:
        parse_federated_job(changed(path, value))
    text = str(error.value)
    assert text.startswith(message)
    assert "\n" not in text


@pytest.mark.parametrize(
    "uri", ["https://mlflow.example:5000/a?b=c@d", "http://10.0.0.1", "file:///work/mlruns", "https://[::1]:5000/"]
)
def test_tracking_servers(uri: str) -> None:
    assert re.fullmatch(PATTERN_TRACKING_URI, uri)
    assert MLflow.model_validate({"trackingUri": uri}).experiment == "isthmus"


@pytest.mark.parametrize("uri", ["https://me:hunter2@mlflow.example", "http://hunter2@mlflow.example/x"])
def test_passwords_in_a_manifest_are_refused(uri: str) -> None:
    assert not re.fullmatch(PATTERN_TRACKING_URI, uri)
    spec = {"rounds": 1, "task": {"image": "i", "command": ["c"]}, "pools": [{"name": "a", "cloud": {}}]}
    with pytest.raises(ManifestError) as error:
        parse_spec({**spec, "tracking": {"mlflow": {"trackingUri": uri}}})
    assert str(error.value) == (
        "spec.tracking.mlflow.trackingUri: must not hold credentials; set MLFLOW_TRACKING_USERNAME and"
        " MLFLOW_TRACKING_PASSWORD in the env of aggregator.template, from a Secret"
    )


@pytest.mark.parametrize("uri", ["mlflow.example", "sqlite:///x.db", "file://relative", "https://", "http://a b"])
def test_malformed_tracking_servers(uri: str) -> None:
    with pytest.raises(ValidationError, match="must be an http://, https:// or file:/// address"):
        MLflow.model_validate({"trackingUri": uri})


def test_every_problem_is_named_at_once() -> None:
    manifest = changed("spec.rounds", 0)
    manifest["spec"]["task"]["image"] = ""
    with pytest.raises(ManifestError) as error:
        parse_federated_job(manifest)
    assert len(error.value.problems) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("kind: Other", "holds no FederatedJob; one is needed"),
        ("kind: FederatedJob\n---\nkind: FederatedJob", "holds 2 FederatedJobs; one is needed"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ManifestError, match=message):
        load_federated_job(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="No such file or directory"):
        load_federated_job(tmp_path / "none.yaml")


def test_late_updates_and_their_limits() -> None:
    manifest = changed("spec.strategy", {"algorithm": "FedBuff", "parameters": {"bufferSize": "3"}})
    spec = parse_federated_job(manifest).spec
    assert (spec.folds_late, spec.strategy.round_size, spec.min_updates) == (True, 3, 2)
    assert spec.stragglers.weight(3) == 0.5
    manifest["spec"]["stragglers"] = {"minUpdates": 4}
    with pytest.raises(ManifestError, match="minUpdates: 4 is more than the 3 with which a round of FedBuff ends"):
        parse_federated_job(manifest)
    manifest["spec"] |= {"strategy": {"algorithm": "Krum", "parameters": {"byzantine": "0"}}}
    manifest["spec"]["stragglers"] = {"late": "Fold", "minUpdates": 3}
    with pytest.raises(ManifestError, match="late: Fold does not go with Krum, which counts one update per client"):
        parse_federated_job(manifest)


def test_settings_change_with_the_rounds() -> None:
    manifest = changed("spec.task.config", {"rate": "0.1", "epochs": "1"})
    manifest["spec"]["task"]["configChanges"] = [
        {"fromRound": 8, "config": {"rate": "0.01"}}, {"fromRound": 4, "config": {"rate": "0.05", "extra": "x"}},
    ]  # fmt: skip
    task = parse_federated_job(manifest).spec.task
    assert task.config_of(3) == {"rate": "0.1", "epochs": "1"}
    assert task.config_of(4) == {"rate": "0.05", "epochs": "1", "extra": "x"}
    assert task.config_of(9) == {"rate": "0.01", "epochs": "1", "extra": "x"}


def test_pools_that_only_evaluate_do_not_count_for_the_quorum() -> None:
    manifest = changed("spec.pools.1.role", "Evaluate")
    spec = parse_federated_job(manifest).spec
    assert (spec.total_clients, spec.fewest_trainers, spec.min_clients) == (4, 2, 2)
    assert [(spec.first_client(pool.name), spec.clients_beside(pool.name)) for pool in spec.pools] == [(0, 2), (0, 2)]
    manifest["spec"]["selection"] = {"minClients": 3}
    with pytest.raises(ManifestError, match="minClients: 3 is more than the 2 clients of all pools that train"):
        parse_federated_job(manifest)
    manifest["spec"]["pools"][0]["role"] = "Evaluate"
    with pytest.raises(ManifestError, match="all of them have the role Evaluate; at least one must train"):
        parse_federated_job(manifest)
