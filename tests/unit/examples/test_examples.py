"""The examples' manifests are valid, and their scripts use all their settings."""

from pathlib import Path

import pytest
import torch
import yaml

from isthmus_contracts.manifests.manifest import load_federated_job, parse_site_spec
from isthmus_examples import central, digits
from isthmus_examples.training import Examples, Settings, evaluate, train

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize("name", ["digits.yaml", "fashion-mnist.yaml", "secure.yaml"])
def test_job_manifests_are_valid(name: str) -> None:
    job = load_federated_job(EXAMPLES / name)
    assert {pool.cloud is None for pool in job.spec.pools} == {True, False}  # a cloud and an HPC pool
    settings = Settings(0, 0.0, 0).updated(job.spec.task.config)
    assert min(settings.epochs, settings.learning_rate, settings.batch_size) > 0  # the script knows every key


def test_the_site_manifest_is_valid_and_is_the_one_that_the_jobs_name() -> None:
    site = yaml.safe_load((EXAMPLES / "hpcsite.yaml").read_text(encoding="utf-8"))
    assert parse_site_spec(site["spec"]).allows("default")
    for name in ("digits.yaml", "fashion-mnist.yaml", "secure.yaml"):
        pools = load_federated_job(EXAMPLES / name).spec.pools
        assert {pool.hpc.site_ref.name for pool in pools if pool.hpc} == {site["metadata"]["name"]}


def test_central_training_gets_the_same_settings_as_the_digits_manifest() -> None:
    spec = load_federated_job(EXAMPLES / "digits.yaml").spec
    assert Settings(0, 0.0, 0).updated(spec.task.config) == digits.DEFAULTS
    assert spec.rounds == central.ROUNDS


def test_digits_are_split_for_good_with_all_classes_held_out() -> None:
    (train_set, held_out), (again, _) = digits.load(), digits.load()
    assert len(train_set) + len(held_out) == 1797
    assert torch.equal(train_set.inputs, again.inputs)
    counts = torch.bincount(held_out.labels)
    assert len(counts) == 10 and int(counts.min()) >= 34


def test_every_client_starts_from_the_same_weights() -> None:
    first, second = digits.build().state_dict(), digits.build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_is_repeatable_and_helps() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(200, 64, generator=generator)
    data = Examples(inputs, (inputs[:, 0] > 0.5).long())
    results = []
    for _ in range(2):
        model = digits.build()
        before = evaluate(model, data)
        loss = train(model, data, torch.optim.SGD(model.parameters(), lr=0.1), Settings(3, 0.1, 16), seed=7)
        results.append((loss, evaluate(model, data)["eval_loss"]))
        assert results[-1][1] < before["eval_loss"]
    assert results[0] == results[1]
    assert before["num_examples"] == 200


def test_settings_come_from_the_manifest_where_it_gives_them() -> None:
    assert digits.DEFAULTS.updated({}) == digits.DEFAULTS
    assert digits.DEFAULTS.updated({"localEpochs": "5"}).epochs == 5
    with pytest.raises(ValueError, match="invalid literal"):
        digits.DEFAULTS.updated({"batchSize": "many"})
