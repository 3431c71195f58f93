"""One manifest trains one model on real data: two pods and two Slurm tasks, from apply to delete."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus_examples import digits
from isthmus_examples.training import evaluate

from .conftest import Platform, eventually, get, run, say

pytestmark = pytest.mark.timeout(1800)


def test_digits_from_apply_to_delete(platform: Platform, job: str) -> None:
    # Enough rounds to be visible to a poll every few seconds.
    manifest = platform.manifest(job, rounds=40, task__config__localEpochs="8")
    platform.apply(manifest)
    metrics, queue, accounting = watch(platform, job)
    platform.wait_for_completion(job)
    say(run("kubectl", "get", "fj", job))
    say(run("kubectl", "get", "pods,svc,pvc", "-l", f"isthmus.dev/job={job}"))

    # Slurm ran one array of two tasks, named after the key.
    assert {line.split()[0].partition("_")[2] for line in queue if "RUNNING" in line} == {"0", "1"}, queue
    assert len({line.split()[0].partition("_")[0] for line in queue}) == 1, queue
    assert "JobState=RUNNING" in accounting
    say("\n".join(sorted(queue)))
    say(accounting)
    say(run("sacct", "--completion", "--parsable2", "--format=JobID,JobName,State,NodeList", check=False))

    # The aggregator exported metrics about both pools.
    for pool in ("cloud", "hpc"):
        assert f'isthmus_updates_total{{job="{job}",namespace="default",pool="{pool}",result="accepted"}}' in metrics
    say("\n".join(line for line in metrics.splitlines() if line.startswith("isthmus_") and "_bucket" not in line))

    status = platform.status(job)
    assert status["phase"] == "Complete"
    assert status["rounds"] == {"current": 40, "completed": 40, "total": 40}
    assert {pool["name"]: pool["desired"] for pool in status["pools"]} == {"cloud": 2, "hpc": 2}
    conditions = {condition["type"]: condition["status"] for condition in status["conditions"]}
    assert conditions["Accepted"] == conditions["Complete"] == "True"
    assert conditions.get("Failed", "False") == "False"
    accuracy = next(float(metric["value"]) for metric in status["metrics"] if metric["name"] == "accuracy")

    # The model is an ordinary PyTorch model, with the accuracy that the status reports.
    model = digits.build()
    model.load_state_dict(torch.load(model_file(platform, job), weights_only=True))
    _, held_out = digits.load()
    measured = evaluate(model, held_out)["accuracy"]
    central = subprocess.run(
        [sys.executable, "-m", "isthmus_examples.central"], capture_output=True, text=True, check=True
    ).stdout.strip()
    say(f"held-out accuracy, Dirichlet alpha 0.3: federated {measured:.4f} (status: {accuracy}); central: {central}")
    assert measured >= 0.90
    assert abs(measured - accuracy) < 0.002

    platform.delete(job)
    say(f"deleted: left over {platform.leftovers(job)}")


def watch(platform: Platform, job: str) -> tuple[str, set[str], str]:
    """Poll until training is complete.

    Return the last metrics, every line that squeue has shown, and the output of scontrol.
    """
    metrics, accounting, shown = "", "", ""
    queue: set[str] = set()
    until = time.monotonic() + 900
    while time.monotonic() < until:
        status = platform.status(job)
        live = platform.slurm.squeue()
        queue.update(live)
        running = [line.split()[0] for line in live if "RUNNING" in line]
        if running and "JobState=RUNNING" not in accounting:
            accounting = run("scontrol", "--oneliner", "show", "job", running[0], check=False)
        line = run("kubectl", "get", "fj", job, "--no-headers").strip()
        if line.rsplit(None, 1)[0] != shown:  # ignore the age column
            say(line)
            shown = line.rsplit(None, 1)[0]
        aggregator = platform.pods(job, "aggregator")
        if aggregator and aggregator[0]["status"].get("podIP"):
            address = aggregator[0]["status"]["podIP"]
            metrics = run("curl", "-s", "--max-time", "10", f"http://{address}:9090/metrics", check=False) or metrics
        if status.get("phase") in ("Complete", "Failed"):
            return metrics, queue, accounting
        time.sleep(0.3)
    raise AssertionError(f"{job} did not end: {platform.status(job)}")


def model_file(platform: Platform, job: str) -> Path:
    """Return the path of the final model, in the directory behind the job's volume."""
    uri = platform.status(job)["model"]["uri"]
    claim, _, path = uri.removeprefix("pvc://default/").partition("/")
    volume = next(item["spec"]["volumeName"] for item in get("pvc", "default") if item["metadata"]["name"] == claim)
    found: dict[str, Any] = json.loads(run("kubectl", "get", "pv", volume, "-o", "json"))
    directory = Path(found["spec"]["hostPath"]["path"])
    assert (directory / path).exists()
    return directory / "model.pt"


def test_deleting_in_the_middle_leaves_nothing(platform: Platform, job: str) -> None:
    platform.apply(platform.manifest(job, rounds=500, task__config__localEpochs="20"))
    platform.wait_for_round(job, 2)
    assert platform.slurm.squeue()
    platform.delete(job)


def test_deleting_at_once_leaves_nothing(platform: Platform, job: str) -> None:
    platform.apply(platform.manifest(job))
    eventually("the operator has seen it", lambda: platform.job(job)["metadata"].get("finalizers"))
    platform.delete(job)


def test_suspend_and_resume_keep_the_checkpoint(platform: Platform, job: str) -> None:
    platform.apply(platform.manifest(job, rounds=500, task__config__localEpochs="30"))
    platform.wait_for_round(job, 3)
    run("kubectl", "patch", "fj", job, "--type=merge", "-p", '{"spec":{"suspend":true}}')
    eventually("it is suspended", lambda: platform.condition(job, "Suspended").get("status") == "True")
    eventually("no client runs", lambda: not platform.pods(job, "client") and not platform.slurm.squeue())
    before = platform.completed(job)
    assert before >= 3
    run("kubectl", "patch", "fj", job, "--type=merge", "-p", '{"spec":{"suspend":false}}')
    platform.wait_for_round(job, before + 1)
    logs = ("kubectl", "logs", f"{job}-aggregator")
    eventually("it has resumed", lambda: "resuming after round" in run(*logs, check=False))
