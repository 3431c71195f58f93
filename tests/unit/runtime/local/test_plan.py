"""Clients, command lines and environments of a local run."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from isthmus.local.plan import LocalClient, backoff, client_environment, inherited, local_clients, local_command
from isthmus_contracts.manifests.manifest import FederatedJob, parse_federated_job


@pytest.fixture
def job() -> FederatedJob:
    return parse_federated_job(
        {
            "apiVersion": "isthmus.dev/v1alpha1",
            "kind": "FederatedJob",
            "metadata": {"name": "demo", "namespace": "team"},
            "spec": {
                "rounds": 1,
                "task": {"image": "i", "command": ["python"], "env": [{"name": "ALPHA", "value": "0.3"}]},
                "pools": [
                    {"name": "cloud", "replicas": 2, "cloud": {}},
                    {"name": "site", "replicas": 1, "hpc": {"siteRef": {"name": "s"}, "environment": "e"}},
                ],
            },
        }
    )


def environment(job: FederatedJob, base: dict[str, str], attempt: int = 0, client: int = 2) -> dict[str, str]:
    place = local_clients(job)[client]
    return client_environment(base, job, "uid-1", place, attempt, "127.0.0.1:1", Path("/tls"), Path("/scratch"))


def test_clients_of_both_worlds_are_numbered_through(job: FederatedJob) -> None:
    assert local_clients(job) == [
        LocalClient("cloud", 0, 2, 0),
        LocalClient("cloud", 1, 2, 1),
        LocalClient("site", 0, 1, 2),
    ]


def test_clients_that_only_evaluate_are_counted_apart(job: FederatedJob) -> None:
    first, second = job.spec.pools
    pools = [first.model_copy(update={"role": "Evaluate"}), second]
    job = dataclasses.replace(job, spec=job.spec.model_copy(update={"pools": pools}))
    found = [environment(job, {}, client=client) for client in range(3)]
    assert [(each["ISTHMUS_POOL"], each["ISTHMUS_CLIENT"], each["ISTHMUS_CLIENTS"]) for each in found] == [
        ("cloud", "0", "2"), ("cloud", "1", "2"), ("site", "0", "1")
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["python", "python3"])
def test_python_is_our_own_interpreter(name: str) -> None:
    assert local_command([name, "-m", "x"]) == [sys.executable, "-m", "x"]


def test_other_programs_are_left_alone() -> None:
    assert local_command(["torchrun", "python"]) == ["torchrun", "python"]


def test_a_client_gets_its_place(job: FederatedJob) -> None:
    told = environment(job, {}, attempt=2)
    assert {name: value for name, value in told.items() if name.startswith("ISTHMUS_")} == {
        "ISTHMUS_ENDPOINT": "127.0.0.1:1",
        "ISTHMUS_SERVER_NAME": "uid-1.aggregator.isthmus.dev",
        "ISTHMUS_TLS_DIR": "/tls",
        "ISTHMUS_JOB_UID": "uid-1",
        "ISTHMUS_JOB": "team/demo",
        "ISTHMUS_POOL": "site",
        "ISTHMUS_INDEX": "0",
        "ISTHMUS_POOL_SIZE": "1",
        "ISTHMUS_CLIENT": "2",
        "ISTHMUS_CLIENTS": "3",
        "ISTHMUS_ATTEMPT": "2",
        "ISTHMUS_SCRATCH": "/scratch",
    }
    assert told["ALPHA"] == "0.3"


def test_the_users_environment_reaches_the_script_but_another_federations_does_not(job: FederatedJob) -> None:
    told = environment(job, {"HOME": "/h", "ALPHA": "9", "ISTHMUS_POOL": "other", "ISTHMUS_DATA": "/d"})
    assert (told["HOME"], told["ALPHA"], told["ISTHMUS_POOL"], told["ISTHMUS_DATA"]) == ("/h", "0.3", "site", "/d")


def test_a_place_in_a_process_group_that_the_shell_was_left_with_does_not_reach_the_clients(job: FederatedJob) -> None:
    left = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1", "ROLE_RANK": "1",
            "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "r"}  # fmt: skip
    assert not environment(job, {**left, "HOME": "/h"}).keys() & left.keys()
    assert not inherited(left).keys() & left.keys()


def test_programs_beside_our_interpreter_are_found_first(job: FederatedJob) -> None:
    assert environment(job, {"PATH": "/bin"})["PATH"] == f"{Path(sys.executable).parent}{os.pathsep}/bin"


def test_clients_share_the_cores_unless_the_user_says_otherwise(
    job: FederatedJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert environment(job, {})["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert environment(job, {})["OMP_NUM_THREADS"] == "4"
    assert environment(job, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


def test_waits_grow_up_to_a_limit() -> None:
    assert [backoff(failures) for failures in (1, 2, 3, 5, 6, 50)] == [1.0, 2.0, 4.0, 16.0, 30.0, 30.0]
