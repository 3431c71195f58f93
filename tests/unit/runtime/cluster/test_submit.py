"""``isthmus submit``: objects made from a script, and errors for invalid flags."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from isthmus.cli import main
from isthmus_contracts.manifests.manifest import load_code, load_federated_job

SCRIPT = "import isthmus\nprint('hello')\n"


def submit(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["submit", *arguments])
    said = capsys.readouterr()
    return int(caught.value.code or 0), said.out, said.err


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "My_train.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_becomes_a_job_that_runs_anywhere(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text("WIDTH = 8\n")
    code, out, _ = submit(
        capsys, str(script), "--image", "r.example/isthmus:1", "--file", str(tmp_path / "net.py"), "--rounds", "3",
        "--pool", "cloud=2", "--pool", "hpc=4@lumi/torch", "--config", "lr=0.1", "--algorithm", "FedAvgM", "--dry-run",
        "--", "--width", "4",
    )  # fmt: skip
    assert code == 0
    path = tmp_path / "job.yaml"
    path.write_text(out)
    job = load_federated_job(path)
    assert job.name == "my-train"
    assert job.spec.task.command == ["python", "My_train.py", "--width", "4"]
    assert (job.spec.rounds, job.spec.strategy.algorithm, job.spec.task.config) == (3, "FedAvgM", {"lr": "0.1"})
    hpc = job.spec.pool("hpc").hpc
    assert hpc is not None
    assert (hpc.site_ref.name, hpc.environment, job.spec.pool("hpc").replicas) == ("lumi", "torch", 4)
    assert load_code(path, job) == {"My_train.py": SCRIPT.encode(), "net.py": b"WIDTH = 8\n"}


def test_a_template_gives_the_rest(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template: dict[str, Any] = {
        "kind": "FederatedJob",
        "spec": {
            "rounds": 7, "task": {"image": "i", "command": ["x"], "env": [{"name": "A", "value": "b"}]},
            "pools": [{"name": "p", "replicas": 3, "cloud": {}}],
        },
    }  # fmt: skip
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(template))
    code, out, _ = submit(capsys, str(script), "--template", str(tmp_path / "t.yaml"), "--name", "mine", "--dry-run")
    assert code == 0
    _, job = yaml.safe_load_all(out)
    assert job["spec"]["rounds"] == 7
    assert job["spec"]["pools"][0]["replicas"] == 3
    assert job["spec"]["task"]["env"] == [{"name": "A", "value": "b"}]
    assert job["spec"]["task"]["image"] == "i"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pool", "cloud"], "--pool: 'cloud' is not NAME=CLIENTS"),
        (["--pool", "hpc=2@lumi"], "lacks the site's environment"),
        (["--config", "lr"], "--config: 'lr' is not NAME=VALUE"),
        (["--name", "Not A Name"], "choose one with --name"),
        (["--algorithm", "FedMagic"], "spec.strategy.algorithm: must be one of"),
        (["--file", "/nowhere/x.py"], "/nowhere/x.py: No such file"),
    ],
)
def test_a_bad_flag_is_one_line(
    script: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = submit(capsys, str(script), "--image", "i", *arguments, "--dry-run")
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_invalid_files_and_no_image_are_errors(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--image: is missing" in submit(capsys, str(script), "--dry-run")[2]
    (tmp_path / "data.bin").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in submit(capsys, str(script), "--image", "i", "--file", str(tmp_path / "data.bin"))[2]
    (tmp_path / "big.txt").write_text("x" * 1_100_000)
    assert "at most 1048576" in submit(capsys, str(script), "--image", "i", "--file", str(tmp_path / "big.txt"))[2]


def test_without_a_cluster_it_is_one_line(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    code, _, err = submit(capsys, str(script), "--image", "i")
    assert code == 1
    assert err.startswith("isthmus: no cluster:")
    assert err.count("\n") == 1
