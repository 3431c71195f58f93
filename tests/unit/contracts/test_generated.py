"""Generated files match their sources, and are valid for an API server."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from isthmus_contracts.manifests.crd import federated_job_crd, hpc_site_crd

ROOT = Path(__file__).parents[3]
CONTRACTS = ROOT / "contracts"


def test_the_crds_are_in_step(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "isthmus_contracts.manifests.crd", tmp_path], check=True)
    for path in (ROOT / "crds").iterdir():
        assert path.read_text() == (tmp_path / path.name).read_text(), f"{path.name}: run `make generate`"
    assert len(list(tmp_path.iterdir())) == len(list((ROOT / "crds").iterdir()))


def test_the_stubs_are_in_step(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    pytest.importorskip("mypy_protobuf")
    folder = Path("isthmus_contracts/pb")
    protocols = sorted(path.relative_to(CONTRACTS) for path in (CONTRACTS / folder).glob("*.proto"))
    assert {path.stem for path in protocols} >= {"bridge", "federation", "gateway"}
    outputs = [f"--{name}={tmp_path}" for name in ("python_out", "grpc_python_out")]
    outputs += [f"--{name}=quiet:{tmp_path}" for name in ("mypy_out", "mypy_grpc_out")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *outputs, *protocols],
        check=True, cwd=CONTRACTS, env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    made = {path.name: path.read_text() for path in (tmp_path / folder).iterdir()}
    stubs = [path for pattern in ("*_pb2*.py", "*_pb2*.pyi") for path in (CONTRACTS / folder).glob(pattern)]
    assert made == {path.name: path.read_text() for path in stubs}, "run `make generate`"


def nodes(schema: dict[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    found = [(path, schema)]
    for name, child in schema.get("properties", {}).items():
        found += nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            found += nodes(schema[key], f"{path}[]")
    return found


@pytest.mark.parametrize("crd", [federated_job_crd(), hpc_site_crd()], ids=["FederatedJob", "HPCSite"])
def test_the_schema_is_structural(crd: dict[str, Any]) -> None:
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for path, node in nodes(schema):
        assert "type" in node, path
        assert not {"$ref", "anyOf", "allOf", "$defs", "const", "title"} & set(node), path
        assert node.get("default", 0) is not None, path
        if node.get("x-kubernetes-list-type") == "map":
            keys = node["x-kubernetes-list-map-keys"]
            assert set(keys) <= set(node["items"].get("required", [])), f"{path}: list keys must be required"


def test_every_field_of_the_spec_is_explained() -> None:
    schema = federated_job_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    unexplained = [path for path, node in nodes(schema) if not node.get("description") and not path.endswith("]")]
    # Names that need no explanation.
    assert [path for path in unexplained if path.rsplit(".", 1)[-1] not in {
        "name", "type", "count", "qos", "fraction", "storageClassName", "suspend",
    }] == []  # fmt: skip


def test_yaml_round_trip() -> None:
    assert yaml.safe_load(yaml.safe_dump(federated_job_crd())) == federated_job_crd()
