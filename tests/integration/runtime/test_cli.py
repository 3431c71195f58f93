"""The command line: fast start-up, and one line for each error in a manifest."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from isthmus.cli import main

GOOD: dict[str, Any] = {
    "rounds": 2,
    "task": {"image": "i", "command": ["python"]},
    "pools": [{"name": "cloud", "replicas": 2, "cloud": {}}],
}
SITE = {"siteRef": {"name": "s"}, "environment": "e"}
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown algorithm": ({"strategy": {"algorithm": "FedMagic"}}, ["spec.strategy.algorithm", "FedAvg"]),
    "zero rounds": ({"rounds": 0}, ["spec.rounds", "at least 1"]),
    "both worlds": ({"pools": [{"name": "p", "cloud": {}, "hpc": SITE}]}, ["spec.pools[0]", "both cloud and hpc"]),
    "neither world": ({"pools": [{"name": "p"}]}, ["spec.pools[0]", "neither cloud nor hpc"]),
    "duplicate pool": (
        {"pools": [{"name": "p", "cloud": {}}, {"name": "p", "cloud": {}}]},
        ["spec.pools[1].name", "'p' is taken"],
    ),
    "minClients above the total": ({"selection": {"minClients": 3}}, ["spec.selection.minClients", "3", "2 clients"]),
    "bad number in parameters": (
        {"strategy": {"algorithm": "FedProx", "parameters": {"mu": "much"}}},
        ["spec.strategy.parameters.mu", "decimal number"],
    ),
    "unknown field": ({"round": 2}, ["spec.round", "unknown field"]),
    "too few clients for masks": (
        {"privacy": {"secureAggregation": {}}},
        ["spec.pools", "privacy.secureAggregation", "at least 3", "only 2", "raise replicas"],
    ),
}


def write(directory: Path, spec: object) -> Path:
    path = directory / "job.yaml"
    manifest = {
        "apiVersion": "isthmus.dev/v1alpha1",
        "kind": "FederatedJob",
        "metadata": {"name": "demo"},
        "spec": spec,
    }
    path.write_text(yaml.safe_dump(manifest))
    return path


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("verb", ["run", "validate"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_manifest_is_one_line_that_names_the_field(
    verb: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change, words = BAD[kind]
    assert exit_code(verb, str(write(tmp_path, {**GOOD, **change}))) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert all(word in err for word in words)
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]  # no file was created


@pytest.mark.parametrize("content", [None, "a: [", "kind: Pod", "\x00"])
def test_what_is_no_manifest_at_all_is_one_line_too(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    if content is not None:
        path.write_text(content)
    assert exit_code("run", str(path)) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and str(path) in err


def test_a_good_manifest_is_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("validate", str(write(tmp_path, GOOD))) == 0
    assert capsys.readouterr().out.endswith("FederatedJob demo is valid: 2 rounds, 2 clients in 1 pool(s)\n")


def test_the_protection_of_a_good_manifest_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pools = [{"name": "cloud", "replicas": 6, "cloud": {}}]
    good = {**GOOD, "pools": pools, "privacy": {"secureAggregation": {}}}
    assert exit_code("validate", str(write(tmp_path, good))) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("secure aggregation: of 6 clients in a round at least 5 must hand in; only their sum is opened")
    assert "from a curious aggregator only" in lines[-1]


def test_an_earlier_run_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job.json").write_text('{"uid": "u", "name": "demo"}')
    assert exit_code("run", str(write(tmp_path, GOOD)), "--dir", str(tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "--resume" in err


def test_the_command_line_waits_for_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom isthmus.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(*{'torch', 'grpc', 'rich', 'numpy'} & set(sys.modules))"
    )
    for arguments in (["--version"], ["validate", str(write(tmp_path, GOOD))]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == ""
