"""Differential privacy with real aggregators and clients."""

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from isthmus_contracts.dp_accounting import Spent
from isthmus_contracts.dp_skellam import SkellamSpent, count_line, count_mean, grid_of

from .conftest import Federation, eventually
from .secure_parties import SECURE, Parties
from .test_faults import records, trained

Make = Callable[..., Federation]
CLIP, NOISE = 0.5, 0.8
LAYER = {"NORM": "layer"}
FROZEN = Path(__file__).with_name("frozen.py")


def private(**more: Any) -> dict[str, Any]:
    return {"differentialPrivacy": {"clipNorm": str(CLIP), "noiseMultiplier": str(NOISE), **more}}


def norm_of_change(job: Federation, number: int) -> tuple[float, int]:
    """Return the length of a round's change of the model, and its number of dimensions."""
    old, new = (load_file(job.state / "checkpoints" / f"round-{n:06d}.safetensors") for n in (number - 1, number))
    change = torch.cat([(new[name].double() - old[name].double()).flatten() for name in new])
    return float(change.norm()), len(change)


def test_a_liar_is_clipped_and_the_account_is_reported(federation: Make, script: Path) -> None:
    """Compressed updates are clipped after they are decoded."""
    job = federation(
        3, 4, privacy=private(maxEpsilon="20"), compression={"upload": "Int8"}, strategy={"algorithm": "FedProx"},
        aggregator={"checkpoint": {"keep": 100}},
    )  # fmt: skip
    job.start_aggregator()
    # The second client's updates are huge (SCALE); the clients wait, so that there is time to check.
    clients = [
        job.start_client(script, index, SCALE="1e12" if index == 1 else "1", HOLD="4", **LAYER) for index in range(3)
    ]
    job.wait_for_round(3)
    status = job.status().privacy
    spent = Spent().after(NOISE, 3)
    assert (status.rounds, status.delta, status.max_epsilon, status.spent) == (3, 1e-5, 20.0, False)
    assert status.epsilon == pytest.approx(spent.epsilon(1e-5), rel=1e-9)
    shown = {"epsilon": status.epsilon, "epsilon_limit": 20.0, "delta": 1e-5, "clipped_ratio": status.clipped_ratio}
    lines = {f'isthmus_privacy_{name}{{job="job",namespace="default"}} {value!r}' for name, value in shown.items()}
    eventually("the gauges have followed", lambda: lines <= {*job.metrics().splitlines()})
    job.let_go()
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * 3, job.log("client-0-0")
    for record in records(job):
        assert record["updates"] == 3
        assert record["privacy"]["clipped_ratio"] > 0.3
    for number in range(1, 5):
        # Three changes of at most CLIP plus noise, whose length varies little in many dimensions, divided by three.
        length, dimensions = norm_of_change(job, number)
        noise = NOISE * CLIP * math.sqrt(dimensions)
        assert (noise * 0.6 - 3 * CLIP) / 3 < length < (noise * 1.4 + 3 * CLIP) / 3


def test_training_ends_when_the_budget_is_spent(federation: Make, script: Path) -> None:
    affordable = 3
    limit = f"{Spent().after(NOISE, affordable).epsilon(1e-5) * 1.001:.6f}"
    job = federation(2, 50, privacy=private(maxEpsilon=limit), strategy={"algorithm": "FedAdam"})
    job.start_aggregator()
    clients = [job.start_client(script, index, **LAYER) for index in range(2)]
    status = job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0], job.log("client-0-0")
    assert (status.completed_rounds, status.total_rounds) == (affordable, 50)
    assert status.privacy.spent and status.privacy.epsilon <= float(limit)
    assert (job.state / "model.safetensors").exists()
    # A restarted aggregator knows it, and only evaluates.
    job.start_aggregator()
    late = [job.start_client(script, index, attempt=1, **LAYER) for index in range(2)]
    assert job.wait_for_completion().completed_rounds == affordable
    assert [client.wait() for client in late] == [0, 0]
    assert all(sum(trained(job, client).values()) == affordable for client in range(2))


def test_a_model_that_was_published_stays_on_the_account(federation: Make, script: Path) -> None:
    """The budget also includes a round whose checkpoint was removed and which is repeated."""
    job = federation(2, 6, privacy=private(), aggregator={"checkpoint": {"keep": 100}})
    job.start_aggregator()
    clients = [job.start_client(script, index, HOLD="5", **LAYER) for index in range(2)]
    job.wait_for_round(4)
    job.kill_aggregator()
    for number in (3, 4):
        (job.state / "checkpoints" / f"round-{number:06d}.safetensors").unlink()
    job.start_aggregator()
    job.let_go()
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0], job.log("client-0-0")
    assert {record["round"]: record["privacy"]["rounds"] for record in records(job)} == {
        1: 1, 2: 2, 3: 5, 4: 6, 5: 7, 6: 8,
    }  # fmt: skip


def test_the_norm_follows_the_updates_and_survives_a_restart(federation: Make, script: Path) -> None:
    adaptive = {"learningRate": "0.5", "countNoise": "0.5"}
    job = federation(
        2, 5, privacy=private(adaptiveClipping=adaptive), aggregator={"checkpoint": {"keep": 100}},
    )  # fmt: skip
    job.start_aggregator()
    clients = [job.start_client(script, index, HOLD="4", **LAYER) for index in range(2)]
    job.wait_for_round(3)
    job.kill_aggregator()
    job.start_aggregator()
    job.let_go()
    status = job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0], job.log("client-0-0")
    told = [record["privacy"] for record in records(job)]
    assert [each["rounds"] for each in told] == [1, 2, 3, 4, 5]
    assert told[0]["clip_norm"] == CLIP
    for one, other in pairwise(told):
        assert other["clip_norm"] == one["next_clip_norm"]
        # The geometric update, from the noisy share that is reported.
        step = 0.5 * ((1 - one["clipped_ratio"]) - 0.5)
        assert one["next_clip_norm"] == pytest.approx(one["clip_norm"] * math.exp(-step), rel=1e-9)
    assert len({each["clip_norm"] for each in told}) == 5
    # No more than without: the count's noise is paid by more noise on the sum.
    assert told[-1]["epsilon"] == pytest.approx(Spent().after(NOISE, 5).epsilon(1e-5), rel=1e-9)
    assert status.privacy.clip_norm == told[-1]["next_clip_norm"]


def test_batch_norm_ends_the_job_with_a_reason(federation: Make, script: Path) -> None:
    job = federation(1, 2, privacy=private())
    last_words = job.directory / "termination-log"
    last_words.touch()
    job.start_aggregator(arguments=["--termination-log", last_words])
    client = job.start_client(script)
    assert job.aggregator is not None and job.aggregator.wait() == 1
    message = "spec.privacy.differentialPrivacy: the model holds statistics of its clients' data (1.running_mean,"
    assert json.loads(last_words.read_text())["message"].startswith(message)
    assert client.wait() == 1
    assert message in job.log("client-0-0")


def test_it_cannot_be_added_to_a_model_that_was_trained_without(federation: Make, script: Path) -> None:
    job = federation(1, 2)
    job.start_aggregator()
    client = job.start_client(script, **LAYER)
    job.wait_for_completion()
    assert client.wait() == 0
    job.spec["privacy"] = private()
    job.start_aggregator(wait=False)
    assert job.aggregator is not None and job.aggregator.wait() == 1
    assert "the checkpoints were made without differential privacy, which cannot be added later" in job.log(
        "aggregator"
    )


@pytest.mark.parametrize("codecs", ["None", "Int8"])
def test_frozen_layers_get_no_noise(federation: Make, codecs: str) -> None:
    job = federation(2, 3, privacy=private(), compression={"upload": codecs})
    job.start_aggregator()
    clients = [job.start(f"client-{k}", [FROZEN], job.client_environment(k)) for k in range(2)]
    job.wait_for_round(1)
    job.kill_aggregator()
    job.start_aggregator()  # it knows the frozen layers from the checkpoint
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0, 0], job.log("client-0") + job.log("client-1")
    torch.manual_seed(0)
    first, last = torch.nn.Linear(300, 200), torch.nn.Linear(200, 1)
    final = torch.load(job.state / "model.pt", weights_only=True)
    assert torch.equal(final["0.weight"], first.weight) and torch.equal(final["0.bias"], first.bias)
    noise = final["1.weight"] - last.weight.detach()
    assert float(noise.norm()) == pytest.approx(CLIP * NOISE / 2 * math.sqrt(3 * 200), rel=0.5)


def test_what_is_unfrozen_later_is_refused_with_the_reason(federation: Make) -> None:
    job = federation(1, 3, privacy=private())
    job.start_aggregator()
    client = job.start("client-0", [FROZEN], job.client_environment(0, UNFREEZE="2"))
    eventually("it is refused", lambda: "update refused" in job.log("client-0"))
    assert (
        "0.weight required no gradient when training began, and has changed since: with differential privacy what is"
        " frozen stays frozen; unfreeze it before the first round"
    ) in job.log("client-0")
    assert re.search(r'isthmus_updates_refused_total\{.*reason="frozen"\} 1\.0', job.metrics())
    assert job.status().completed_rounds == 1
    assert client.poll() is None


@pytest.mark.parametrize("adaptive", [{}, {"adaptiveClipping": {"countNoise": "1"}}], ids=["fixed", "adaptive"])
def test_noise_of_the_clients_hides_the_sum_and_is_accounted_for(
    federation: Make, script: Path, adaptive: dict[str, Any]
) -> None:
    """Secure aggregation of four clients, of which three are enough. The aggregator restarts in between."""
    asked = private(noise="Distributed", **adaptive)
    job = federation(
        4, 3, privacy=asked | SECURE, stragglers={"minUpdates": 3}, aggregator={"checkpoint": {"keep": 100}},
    )  # fmt: skip
    parties = Parties()
    job.start_aggregator()
    clients = [parties.start_client(job, script, index, HOLD="3", **LAYER) for index in range(4)]
    job.wait_for_round(2)
    job.kill_aggregator()
    job.start_aggregator()
    job.let_go()
    job.wait_for_completion()
    assert [client.wait() for client in clients] == [0] * 4, job.log("client-0-0")
    told = [record["privacy"] for record in records(job)]
    assert [each["rounds"] for each in told] == [1, 2, 3]
    lines = [grid_of(32, 4, NOISE if not adaptive else (NOISE**-2 - 2.0**-2) ** -0.5, 3).line]
    if adaptive:
        lines.append(count_line(count_mean(1.0, 3), 3))
    bound = SkellamSpent().after(*lines, sums=3).epsilon(1e-5)
    assert told[-1]["epsilon"] == pytest.approx(bound, rel=1e-6)
    assert told[-1]["epsilon"] > Spent().after(NOISE, 3).epsilon(1e-5)
    for record in records(job):
        # Noise of all four, of which three are enough, and changes of at most the norm.
        length, dimensions = norm_of_change(job, record["round"])
        norm = record["privacy"]["clip_norm"]
        noise = NOISE * norm * math.sqrt(dimensions * record["updates"] / 3)
        assert (noise * 0.6 - 4 * norm) / 4 < length < (noise * 1.6 + 4 * norm) / 4
