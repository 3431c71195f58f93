"""Selection of the client that sends the initial weights."""

from isthmus.aggregator.clients.initialization import SILENCE_SECONDS, Initialization
from isthmus.aggregator.clients.membership import Client

DEADLINE = 3600.0
READY = [Client(("pool", index), instance=str(index)) for index in range(3)]


def test_clients_are_asked_one_after_the_other() -> None:
    asking = Initialization()
    assert asking.choose([], 0.0, DEADLINE) is None
    assert asking.choose(READY, 0.0, DEADLINE) is READY[0]
    assert asking.choose(READY, 1.0, DEADLINE) is None
    asking.refused(READY[0].id)
    assert asking.choose(READY, 2.0, DEADLINE) is READY[1]
    # It is silent, but may still answer.
    assert asking.until == 2.0 + SILENCE_SECONDS
    assert asking.choose(READY, asking.until, DEADLINE) is READY[2]
    assert all(asking.asked(client.id) for client in READY)
    assert not asking.asked(("pool", 3))


def test_a_client_that_sends_has_the_time_of_a_round() -> None:
    asking = Initialization()
    asking.choose(READY, 100.0, DEADLINE)
    asking.begun(READY[1].id)
    assert asking.until == 100.0 + SILENCE_SECONDS
    asking.begun(READY[0].id)
    asking.begun(READY[0].id)
    assert asking.until == 100.0 + DEADLINE
    assert asking.choose(READY, 99.0 + DEADLINE, DEADLINE) is None
    assert asking.choose(READY, 100.0 + DEADLINE, DEADLINE) is READY[1]


def test_a_client_that_disconnects_is_replaced_at_once() -> None:
    asking = Initialization()
    asking.choose(READY, 0.0, DEADLINE)
    assert asking.choose(READY[1:], 1.0, DEADLINE) is READY[1]


def test_the_selection_starts_over_after_all_clients() -> None:
    asking = Initialization()
    for now, client in enumerate(READY):
        assert asking.choose(READY, float(now), 2.0) is client
        asking.refused(client.id)
    assert asking.choose(READY, 3.0, 2.0) is None  # not at once
    # A new process of a client is asked again.
    newer = Client(READY[1].id, instance="newer")
    assert asking.choose([READY[0], newer], 3.5, 2.0) is newer
    asking.refused(newer.id)
    assert asking.choose([READY[0], newer], 5.5, 2.0) is READY[0]
