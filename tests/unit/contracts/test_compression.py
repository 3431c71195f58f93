"""Chains in the manifest: valid ones, and one line for each fault, from the models and the schema alike."""

import re
from typing import Any

import pytest
import yaml

from isthmus_contracts.api.compression import PATTERN_DOWNLOAD, PATTERN_UPLOAD, Compression
from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.strategy import ALGORITHM_PARAMETERS
from isthmus_contracts.manifests.crd import federated_job_crd
from isthmus_contracts.manifests.manifest import ManifestError, parse_spec

GOOD: dict[str, Any] = {
    "rounds": 2,
    "task": {"image": "img", "command": ["python"]},
    "pools": [{"name": "cloud", "cloud": {}}],
}


def parsed(text: str) -> FederatedJobSpec:
    return parse_spec({**GOOD, "compression": yaml.safe_load(text)})


@pytest.mark.parametrize(
    ("chain", "codecs"),
    [
        ("None", []),
        ("Int8", ["Delta", "Int8"]),
        ("Delta+Int8", ["Delta", "Int8"]),
        ("Rotation+Int4+Zstd", ["Delta", "Rotation", "Int4", "Zstd"]),
        ("Float16", ["Delta", "Float16"]),
        ("BFloat16+Zstd", ["Delta", "BFloat16", "Zstd"]),
        ("Delta+BFloat16", ["Delta", "BFloat16"]),
        ("Zstd", ["Zstd"]),
        ("TopK", ["Delta", "TopK=0.01"]),
        ("TopK+Int8", ["Delta", "TopK=0.01", "Int8"]),
    ],
)
def test_chains_and_what_they_imply(chain: str, codecs: list[str]) -> None:
    compression = parsed(f"{{upload: {chain}}}").compression
    assert compression.upload_codecs == codecs
    assert compression.download_codecs == []


@pytest.mark.parametrize(
    ("chain", "codecs"),
    [
        ("Float16", ["Float16"]),
        ("Delta+Float16", ["Delta", "Float16"]),
        ("Int8", ["Delta", "Int8"]),
        ("Zstd", ["Zstd"]),
    ],
)
def test_downloads_in_half_precision_need_no_base(chain: str, codecs: list[str]) -> None:
    assert parsed(f"{{download: {chain}}}").compression.download_codecs == codecs


def test_the_simple_case() -> None:
    compression = parsed("{upload: Int8, download: None}").compression
    assert (compression.upload, compression.download) == ("Int8", "None")
    assert parsed("{upload: TopK, topKFraction: '1e-3'}").compression.upload_codecs == ["Delta", "TopK=0.001"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{upload: Int9}", "spec.compression.upload: 'Int9' is no codec; there are None, Delta, TopK, Rotation, "),
        ("{upload: None+Int8}", "spec.compression.upload: None stands alone, not in 'None+Int8'"),
        ("{upload: Zstd+Int8}", "spec.compression.upload: Zstd comes last, not as in 'Zstd+Int8'"),
        ("{upload: Delta}", "spec.compression.upload: 'Delta' gains nothing: Delta needs Float16, "),
        ("{upload: Rotation+Float16}", "spec.compression.upload: Rotation needs Int8 or Int4 after it"),
        ("{upload: Int8+Delta}", "spec.compression.upload: 'Int8+Delta' is not in the order [Delta+]["),
        ("{upload: Int8+Int4}", "spec.compression.upload: 'Int8+Int4' is not in the order [Delta+]["),
        ("{upload: TopK+Rotation+Int8}", "spec.compression.upload: 'TopK+Rotation+Int8' is not in the order"),
        ("{upload: [Int8]}", "spec.compression.upload: must be a string (put it in quotes), not a list"),
        ("{download: TopK}", "spec.compression.download: TopK is for uploads: the aggregator keeps no error feedback"),
        ("{download: Int3}", "spec.compression.download: 'Int3' is no codec"),
        ("{topKFraction: '0'}", "spec.compression.topKFraction: must be above 0 and at most 0.5, not 0"),
        ("{topKFraction: 0.01}", "spec.compression.topKFraction: must be a string (put it in quotes), not 0.01"),
        ("{both: Int8}", "spec.compression.both: unknown field"),
    ],
)
def test_one_line_names_the_field(text: str, message: str) -> None:
    with pytest.raises(ManifestError) as error:
        parsed(text)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHM_PARAMETERS))
def test_algorithms_that_do_not_support_sparse_updates(algorithm: str) -> None:
    strategy = {"algorithm": algorithm} | ({"class": "my:Rule"} if algorithm == "Custom" else {})
    stragglers = {"minUpdates": 1 if algorithm == "FedAsync" else 10}
    text = {**GOOD, "strategy": strategy, "compression": {"upload": "TopK+Int8+Zstd"}, "stragglers": stragglers}
    refused = {"CoordinateMedian", "TrimmedMean", "Krum", "MultiKrum", "GeometricMedian", "SCAFFOLD", "FedDyn"}
    text["pools"] = [{"name": "cloud", "replicas": 20, "cloud": {}}]
    if algorithm not in refused:
        assert parse_spec(text).compression.upload == "TopK+Int8+Zstd"
        return
    with pytest.raises(ManifestError) as error:
        parse_spec(text)
    assert str(error.value).startswith(f"spec.compression.upload: TopK does not go with {algorithm}, which ")
    assert parse_spec({**text, "compression": {"upload": "Int8"}}).strategy.algorithm == algorithm


def test_the_schema_gives_the_same_verdict() -> None:
    spec = federated_job_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    fields = spec["properties"]["compression"]["properties"]
    assert (fields["upload"]["pattern"], fields["download"]["pattern"]) == (PATTERN_UPLOAD, PATTERN_DOWNLOAD)
    words = ["None", "Delta", "TopK", "Rotation", "Float16", "Int8", "Zstd", "Other"]
    chains = [*words, *(f"{a}+{b}" for a in words for b in words)]
    chains += [f"{a}+{b}+{c}" for a in words for b in words for c in words]
    for field in ("upload", "download"):
        for chain in chains:
            in_schema = re.search(fields[field]["pattern"], chain) is not None
            try:
                Compression.model_validate({field: chain})
            except ValueError:
                assert not in_schema, chain
            else:
                assert in_schema, chain
