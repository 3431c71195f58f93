"""The admin's view of the privacy section: check, root, digest, and the signing root that `certs` creates."""

from pathlib import Path
from typing import Any

import pytest

from isthmus_bridge.cli import main
from isthmus_bridge.parties.signing_root import KEY_FILE
from isthmus_bridge.policy.program_digest import digest_of
from isthmus_contracts.wire.parties import new_root, public_root

from .test_command_line import policy_file

CLOUD = new_root()[1]
MANIFEST = """
apiVersion: isthmus.dev/v1alpha1
kind: FederatedJob
metadata: {name: digits}
spec:
  task:
    image: registry.example/train:1
    command: [python, train.py]
    env: [{name: SEED, value: "7"}]
    code: {configMapRef: {name: digits-code}}
  rounds: 2
  pools:
  - name: cloud
    replicas: 2
    cloud: {}
"""
CONFIG_MAP = """---
apiVersion: v1
kind: ConfigMap
metadata: {name: digits-code}
data: {train.py: "x = 1\\n"}
"""


def certs(folder: Path) -> int:
    return main(["certs", "--dir", str(folder / "certs"), "--host", "login1.example", "--operator", "prod"])


def said(capsys: pytest.CaptureFixture[str], path: Path) -> list[str]:
    capsys.readouterr()
    main(["check", "--policy", str(path)])
    return capsys.readouterr().out.splitlines()


def test_certs_creates_the_signing_root_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert certs(tmp_path) == 0
    folder = tmp_path / "certs"
    key = (folder / KEY_FILE).read_bytes()
    line = f"other sites trust it as {public_root(key)}"
    assert line in capsys.readouterr().out.splitlines()
    assert (folder / KEY_FILE).stat().st_mode & 0o777 == (folder / "server" / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert certs(tmp_path) == 0
    assert line in capsys.readouterr().out.splitlines()
    assert main(["certs", "--dir", str(folder), "--new-ca", "--operator", "prod"]) == 0
    assert (folder / KEY_FILE).read_bytes() == (folder / "server" / KEY_FILE).read_bytes() == key
    (folder / KEY_FILE).unlink()
    assert main(["certs", "--dir", str(folder), "--operator", "second"]) == 0
    assert certs(tmp_path) == 1
    assert f"{folder}: {KEY_FILE} is missing: put it there temporarily" in capsys.readouterr().err


def test_root_prints_the_entry_for_other_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = policy_file(tmp_path)
    assert main(["root", "--policy", str(path)]) == 1
    assert "signing-root.key does not exist; `isthmus-bridge certs` creates it" in capsys.readouterr().err
    certs(tmp_path)
    capsys.readouterr()
    assert main(["root", "--policy", str(path)]) == 0
    shown = capsys.readouterr().out
    public = public_root((tmp_path / "certs" / KEY_FILE).read_bytes())
    assert shown == f'lumi: "{public}"\n'
    (tmp_path / "certs" / "server" / KEY_FILE).write_text("damaged")
    assert main(["root", "--policy", str(path)]) == 1
    assert "server/signing-root.key: root key: not a private key" in capsys.readouterr().err


def test_doctor_shows_the_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown() -> str:
        capsys.readouterr()
        main(["doctor", "--policy", str(path)])
        return next(line for line in capsys.readouterr().out.splitlines() if "secure aggregation" in line)

    path = policy_file(tmp_path)
    certs(tmp_path)
    public = public_root((tmp_path / "certs" / KEY_FILE).read_bytes())
    assert shown() == f"ok       secure aggregation: party lumi, root {public}"
    (tmp_path / "certs" / "server" / KEY_FILE).write_text("damaged")
    assert shown().startswith("PROBLEM  secure aggregation: ")


def test_digest_prints_the_entry_for_code_digests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = digest_of(["python", "train.py"], {"SEED": "7"}, {"train.py": b"x = 1\n"})
    job = tmp_path / "job.yaml"
    job.write_text(MANIFEST + CONFIG_MAP)
    assert main(["digest", str(job)]) == 0
    assert capsys.readouterr().out == f'- "{digest}"  # digits\n'
    job.write_text(MANIFEST)
    assert main(["digest", str(job)]) == 1
    assert "the ConfigMap 'digits-code' must be in" in capsys.readouterr().err
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text("x = 1\n")
    assert main(["digest", str(job), "--code", str(tmp_path / "code")]) == 0
    assert capsys.readouterr().out == f'- "{digest}"  # digits\n'
    (tmp_path / "code" / "a b").write_text("")
    assert main(["digest", str(job), "--code", str(tmp_path / "code")]) == 1
    assert "'a b' is no name of a file" in capsys.readouterr().err
    assert main(["digest", str(tmp_path / "none.yaml")]) == 1


def test_check_explains_the_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certs(tmp_path)
    rules = {
        "secure_aggregation": {"required": True, "min_parties": 2, "min_clients": 4, "roots": {"cloud": CLOUD}},
        "differential_privacy": {"required": True, "max_epsilon": 8, "min_noise_multiplier": 0.5},
        "code_digests": ["ab" * 32],
        "tensors": ["head.*"],
        "max_bytes_per_round": 1000,
    }
    lines = said(capsys, policy_file(tmp_path, privacy=rules))
    assert lines[: lines.index("isthmus://operator/prod may submit")] == [
        "site lumi",
        "every job",
        "  must use secure aggregation; clients here then take part only",
        "    in rounds of at least 4 clients and 2 parties",
        "    with clients of this site (lumi), cloud",
        "  must use differential privacy: maxEpsilon at most 8, noiseMultiplier at least 0.5",
        "  may run 1 approved program",
        "  may send the tensors head.*, at most 1000 bytes for each client and round",
        f"  is recorded in {tmp_path}/run/audit.jsonl",
    ]
    assert not [line for line in lines if "privacy" in line and line.startswith(("warning", "problem"))]


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (
            {"secure_aggregation": {"required": True, "roots": {"cloud": CLOUD}}},
            "warning: privacy.secure_aggregation.min_parties: 1 protects against a curious aggregator only",
        ),
        (
            {"secure_aggregation": {"min_parties": 2}},
            "warning: privacy.secure_aggregation.roots: holds 0 other parties, so no round has 2",
        ),
        (
            {"secure_aggregation": {"required": True}},
            "warning: privacy.secure_aggregation.roots: is empty, so clients of this site train with each other only",
        ),
        ({"code_digests": []}, "warning: privacy.code_digests: is empty, so every job is denied"),
        ({"image_digests": []}, "warning: privacy.image_digests: is empty"),
        (
            {"secure_aggregation": {"roots": {"lumi": CLOUD}}},
            "problem: privacy.secure_aggregation.roots.lumi: is not this site's root",
        ),
    ],
)
def test_check_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str], rules: dict[str, Any], words: str) -> None:
    certs(tmp_path)
    lines = said(capsys, policy_file(tmp_path, privacy=rules))
    assert [line for line in lines if line.startswith(words)], lines


@pytest.mark.parametrize(
    ("prefix", "inside", "warned"),
    [
        (["run", "--bind={work_dir}:/work"], {}, True),
        (["run", "--bind={work_dir}:/work"], {"work_dir": "/work"}, False),
        (["run", "--bind={work_dir}:{work_dir}"], {}, False),
        (["run", "--bind={work_dir}"], {}, False),
    ],
)
def test_check_warns_of_a_container_that_hides_the_audit_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prefix: list[str], inside: dict[str, str], warned: bool
) -> None:
    path = policy_file(tmp_path, environments={"box": {"prefix": prefix, "inside": inside}})
    words = "warning: environments.box.inside.work_dir: is not set"
    assert any(line.startswith(words) for line in said(capsys, path)) == warned


def test_a_site_that_requires_secure_aggregation_needs_a_root(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = policy_file(tmp_path, privacy={"secure_aggregation": {"required": True}})
    words = "privacy.secure_aggregation.required: the site has no root"
    assert [line for line in said(capsys, path) if line.startswith(f"problem: {words}")]
    assert main(["serve", "--policy", str(path)]) == 2
    assert words in capsys.readouterr().err
