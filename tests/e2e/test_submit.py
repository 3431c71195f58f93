"""A plain PyTorch script without an image of its own, submitted with one command, trains in pods and Slurm tasks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from .conftest import Platform, eventually, run, say

pytestmark = pytest.mark.timeout(1800)

# An ordinary script; its four lines of Isthmus are the import, the loop, the config and the submission.
SCRIPT = """\
import torch
from sklearn.datasets import load_digits
from torch import nn

import isthmus
from net import Net

digits = load_digits()
inputs = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
place = isthmus.context()
mine = torch.arange(len(labels)) % place.clients == place.client


model = Net()


def evaluate():
    with torch.no_grad():
        return {"accuracy": (model(inputs).argmax(1) == labels).float().mean().item()}


print("client", place.client, "of", place.clients, "in", place.pool, flush=True)
for rnd in isthmus.rounds(model, evaluate=evaluate):
    optimizer = torch.optim.SGD(model.parameters(), lr=float(rnd.config["lr"]))
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[mine]), labels[mine])
        loss.backward()
        optimizer.step()
    print("round", rnd.number, "loss", loss.item(), flush=True)
    rnd.submit(num_examples=int(mine.sum()), loss=loss.item())
"""
NET = """\
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
"""


def isthmus(*arguments: str | Path, check: bool = True) -> str:
    """Run the command that is installed as kubectl's plug-in, and return its output."""
    name = Path(sys.executable).with_name("kubectl-fj")
    done = subprocess.run([name, *arguments], capture_output=True, text=True, timeout=600, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_script_trains_in_both_worlds_without_an_image_of_its_own(
    platform: Platform, job: str, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "template.yaml").write_text(yaml.safe_dump(platform.manifest(job, rounds=12)))
    say(isthmus("sites"))
    said = isthmus("submit", tmp_path / "train.py", "--file", tmp_path / "net.py", "--name", job, "--config", "lr=0.5",
                   "--template", tmp_path / "template.yaml", "-n", platform.namespace)  # fmt: skip
    say(said)
    assert f"as FederatedJob {job}" in said

    def of_a_task() -> str:
        text = isthmus("logs", job, "hpc/1", "--tail", "50", check=False)
        return text if "client 3 of 4 in hpc" in text else ""

    # The log of a Slurm task, fetched through the operator and the bridge while the task runs.
    say(eventually("the Slurm task's log", of_a_task))
    say(isthmus("status", job, "--once"))
    platform.wait_for_completion(job)
    assert "client 1 of 4 in cloud" in isthmus("logs", job, "cloud/1")
    table = isthmus("status", job, "--once")
    say(table)
    assert "Complete" in table
    assert "round 12/12" in table
    assert platform.status(job)["pools"][1]["jobs"]
    out = tmp_path / "model.safetensors"
    isthmus("model", "get", job, "-o", out)
    from safetensors.torch import load_file

    weights = load_file(out)
    namespace: dict[str, type[torch.nn.Module]] = {}
    exec(NET, namespace)  # noqa: S102
    namespace["Net"]().load_state_dict(weights)
    best = float(platform.status(job)["bestMetric"]["value"])
    say(f"accuracy {best}")
    assert best > 0.85
    # The files are part of the job, and are deleted with it.
    assert json.loads(run("kubectl", "get", "configmap", f"{job}-code", "-o", "json"))["immutable"] is True
    platform.delete(job)
