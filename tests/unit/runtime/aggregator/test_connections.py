"""Connections without a call, and the notation of peers."""

import pytest

from isthmus.aggregator.rpc.connections import MOST_SILENT, SILENT_SECONDS, SWEEP_SECONDS, Connections, peer_address


def test_a_connection_without_a_call_is_ended_after_a_while() -> None:
    connections = Connections(2)
    connections.admit("pool/0", 1, "ipv4:1.1.1.1:1")
    found = {"ipv4:1.1.1.1:1", "ipv4:6.6.6.6:6"}
    assert connections.overdue(found, 100.0) == set()
    assert connections.overdue(found, 100.0 + SILENT_SECONDS) == set()
    assert connections.overdue(found, 100.0 + SILENT_SECONDS + SWEEP_SECONDS) == {"ipv4:6.6.6.6:6"}


def test_the_oldest_of_too_many_connections_without_a_call_are_ended() -> None:
    connections = Connections(2)
    first = {f"ipv4:6.6.6.6:{port}" for port in range(MOST_SILENT + 2)}
    assert connections.overdue(first, 100.0) == set(), "there is room for the clients themselves"
    second = {f"ipv4:7.7.7.7:{port}" for port in range(5)}
    ended = connections.overdue(first | second, 101.0)
    assert len(ended) == 5 and ended <= first


def test_an_address_belongs_to_its_newest_caller() -> None:
    connections = Connections(2)
    connections.admit("pool/0", 1, "ipv4:1.1.1.1:1")
    connections.admit("pool/1", 1, "ipv4:1.1.1.1:1")
    assert connections._by_caller == {"pool/1": {"ipv4:1.1.1.1:1": None}}
    connections.overdue(set(), 100.0)
    assert connections._by_caller == {}


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:127.0.0.1:38472", "ipv4:127.0.0.1:38472"),
        ("ipv6:%5B::1%5D:38472", "ipv6:[::1]:38472"),
        ("ipv6:[::ffff:10.0.0.1]:7", "ipv4:10.0.0.1:7"),
    ],
)
def test_peers_are_compared_in_one_notation(peer: str, address: str) -> None:
    assert peer_address(peer) == address
