"""Admission, fencing and permissions of clients."""

from typing import Any

import pytest

from isthmus.aggregator.clients.client_history import ClientHistory
from isthmus.aggregator.clients.membership import Client, Membership, Refusal
from isthmus.aggregator.state.metrics_by_round import Progress, WeightedMeans
from isthmus.aggregator.state.training_state import TrainingState
from isthmus.aggregator.updates.permissions import Permissions
from isthmus_contracts.api.federated_job import Objective
from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_contracts.pb import federation_pb2 as pb

SPEC = parse_spec(
    {
        "rounds": 1,
        "task": {"image": "x", "command": ["python"]},
        "pools": [
            {"name": "cloud", "replicas": 2, "cloud": {}},
            {"name": "a", "replicas": 1, "cloud": {}},
            {"name": "judge", "replicas": 1, "role": "Evaluate", "cloud": {}},
        ],
    }
)


def hello(pool: str = "cloud", index: int = 0, attempt: int = 0, instance: str = "x", uid: str = "uid") -> pb.Hello:
    return pb.Hello(job_uid=uid, pool=pool, index=index, attempt=attempt, instance=instance)


def drained(client: Client) -> list[pb.ServerMessage | None]:
    assert client.outbox is not None
    return [client.outbox.get_nowait() for _ in range(client.outbox.qsize())]


@pytest.fixture
def members() -> Membership:
    return Membership(SPEC)


@pytest.fixture
def permissions(members: Membership) -> Permissions:
    return Permissions("uid", SPEC, members, TrainingState())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (hello(uid="other"), "not of other"),
        (hello(pool="moon"), "no pool 'moon'"),
        (hello(index=2), "pool cloud has 2 clients; there is no client with index 2"),
        (hello(index=2**32 - 1), "there is no client with index 4294967295"),
        (hello(attempt=2**32 - 1), "attempt 4294967295 cannot be one that a scheduler has started"),
        (hello(instance="x" * 129), "instance must be at most 128 printable characters"),
        (hello(instance="a\nb"), "instance must be at most 128 printable characters, not 'a"),
        (hello(uid="u" * 5000), "the hello has 5"),
    ],
)
def test_clients_of_other_jobs_are_refused(permissions: Permissions, bad: pb.Hello, message: str) -> None:
    with pytest.raises(Refusal, match=message) as refusal:
        permissions.check_hello(bad)
    assert refusal.value.stop.reason == pb.Stop.REFUSED
    assert refusal.value.stop.message.isprintable() and len(refusal.value.stop.message) < 300


def update(pool: str = "cloud", index: int = 0, attempt: int = 0, instance: str = "x", uid: str = "uid") -> Any:
    return pb.UpdateHeader(job_uid=uid, pool=pool, index=index, attempt=attempt, instance=instance, round=1)


def test_permission_to_submit(members: Membership, permissions: Permissions) -> None:
    """Only the process that sent the client's last hello may submit."""

    def reason(header: pb.UpdateHeader) -> str:
        reply = permissions.check_update(header)
        return reply.reason if reply is not None else ""

    assert reason(update()) == "not_connected"
    client = members.admit(hello(attempt=1, instance="y"))
    assert reason(update(attempt=1, instance="y")) == ""
    assert reason(update(attempt=1, instance="z")) == "fenced"
    assert reason(update(attempt=0, instance="y")) == "fenced"
    assert reason(update(attempt=2, instance="y")) == "not_connected"
    for header in (update(index=2), update("moon"), update("judge"), update(uid="other", attempt=1, instance="y")):
        assert reason(header) == "not_selected"
    # The permission outlasts the control stream.
    assert client.outbox is not None
    members.leave(client, client.outbox)
    assert reason(update(attempt=1, instance="y")) == ""


def test_only_clients_that_were_offered_a_round_take_part(members: Membership, permissions: Permissions) -> None:
    def offered(index: int, number: int, digest: str = "") -> bool:
        header = pb.UpdateHeader(pool="cloud", index=index, round=number, base_digest=digest)
        return permissions.was_offered(header, history)

    history = ClientHistory().after_round(1, [("cloud", 0)], {}, [], horizon=2)
    assert offered(0, 1) and not offered(1, 1) and not offered(0, 2)
    for number in (2, 3, 4):
        history = history.after_round(number, [("cloud", 1)], {}, [], horizon=2)
    history = ClientHistory.of_text(history.text())
    assert [offered(1, number) for number in (1, 2, 3, 4)] == [False, True, True, True]


def test_a_clients_unfinished_round_counts_only_after_a_restart(members: Membership) -> None:
    """It counts only for the round that was in progress then, and for that round's base model."""
    training = TrainingState(resumed=7)
    permissions = Permissions("uid", SPEC, members, training)
    for pool, trains in (("cloud", True), ("judge", False)):
        client = members.admit(pb.Hello(pool=pool, instance="x", round=7, base_digest="d"))
        header = pb.UpdateHeader(pool=pool, round=7, base_digest="d")
        assert permissions.was_offered(header, ClientHistory()) is trains
        assert not permissions.resumes(client, 7, "other") and not permissions.resumes(client, 8, "d")
        training.resumed = 0
        assert not permissions.was_offered(header, ClientHistory())
        training.resumed = 7


def test_an_attempt_fences_only_while_it_is_connected(members: Membership) -> None:
    """A made-up attempt number does not lock out the next real attempt."""
    client = members.admit(hello(attempt=5000, instance="false"))
    assert client.outbox is not None
    with pytest.raises(Refusal, match="attempt 5000 of cloud/0 has taken over"):
        members.admit(hello(attempt=1, instance="true"))
    members.leave(client, client.outbox)
    assert members.admit(hello(attempt=1, instance="true")).attempt == 1


def test_messages_of_failures_are_made_printable(members: Membership) -> None:
    client = members.admit(hello())
    members.fail(client, pb.Failure(message="no\n\x1b[2Jforged" + "x" * 9000, traceback="  a\x1b[31m\nb" + "y" * 9000))
    failure = members.pool_statuses()[0].failures[0]
    assert failure.message.startswith("no [2Jforgedx") and failure.message.isprintable() and len(failure.message) == 500
    assert "\x1b" not in failure.traceback and len(failure.traceback) == 2000


def test_a_newer_attempt_fences_the_older(members: Membership) -> None:
    old = members.admit(hello(attempt=1))
    outbox = old.outbox
    assert outbox is not None
    members.admit(hello(attempt=2, instance="y"))
    stop = outbox.get_nowait()
    assert stop is not None
    assert stop.stop.reason == pb.Stop.FENCED
    assert outbox.get_nowait() is None
    with pytest.raises(Refusal, match="attempt 2 of cloud/0 has taken over"):
        members.admit(hello(attempt=1))


def test_a_reconnect_of_the_same_process_only_ends_the_old_stream(members: Membership) -> None:
    client = members.admit(hello())
    old = client.outbox
    assert old is not None
    members.admit(hello())
    assert old.get_nowait() is None
    members.leave(client, old)  # the end of the old stream is noticed late
    assert client.connected


def test_ready_is_in_the_manifests_order(members: Membership) -> None:
    for pool, index in (("a", 0), ("cloud", 1), ("cloud", 0)):
        members.admit(hello(pool, index))
    assert [client.name for client in members.ready()] == ["cloud/0", "cloud/1", "a/0"]


def test_failures_count_until_a_newer_process_connects(members: Membership) -> None:
    client = members.admit(hello())
    members.fail(client, pb.Failure(message="ValueError: no", traceback="..."))
    status = members.pool_statuses()[0]
    assert (status.connected, status.failed, status.failures[0].message) == (0, 1, "ValueError: no")
    members.admit(hello(attempt=1, instance="y"))
    assert (members.pool_statuses()[0].connected, members.pool_statuses()[0].failed) == (1, 0)


def test_means_weigh_by_examples_and_count_a_client_once() -> None:
    means = WeightedMeans()
    means.add(("p", 0), 1, {"loss": 100.0})
    means.add(("p", 0), 1, {"loss": 4.0, "odd": float("nan")})
    means.add(("p", 1), 3, {"loss": 0.0, "extra": 2.0})
    assert means.means() == {"loss": 1.0, "extra": 2.0}


@pytest.mark.parametrize(("goal", "best"), [("Maximize", 2), ("Minimize", 1)])
def test_the_best_follows_the_objective(goal: str, best: int) -> None:
    progress = Progress(Objective.model_validate({"metric": "score", "goal": goal}))
    for number, value in ((1, 0.1), (2, 0.9), (3, 0.5)):
        progress.take(number, {"score": value, "other": 1.0}, value)
    assert progress.best.round == best
    assert progress.newest["score"].value == 0.5


def test_predecessors_of_a_new_attempt() -> None:
    manifest = {
        "rounds": 1,
        "task": {"image": "x", "command": ["python"]},
        "pools": [
            {"name": "cloud", "replicas": 1, "cloud": {}},
            {"name": "hpc", "replicas": 1, "hpc": {"siteRef": {"name": "s"}, "environment": "e"}},
        ],
    }
    members = Membership(parse_spec(manifest))
    assert members.predecessor(hello("hpc", attempt=1)) is None
    for pool, waits in (("hpc", True), ("cloud", False)):
        client = members.admit(hello(pool, attempt=1))
        assert (members.predecessor(hello(pool, attempt=2, instance="y")) is client) is waits
        assert members.predecessor(hello(pool, attempt=1)) is None
        client.outbox = None
        assert members.predecessor(hello(pool, attempt=2)) is None
