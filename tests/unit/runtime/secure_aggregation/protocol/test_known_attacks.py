"""Attacks on other implementations and protocols of secure aggregation, tried on this one."""

import itertools
from typing import Any

import pytest

from isthmus.secure_aggregation import graph, transcript
from isthmus.secure_aggregation.parameters import ClientId, Outgoing, Phase, point
from isthmus.secure_aggregation.refusal import Reason, Refusal
from isthmus_contracts import secure_sums
from isthmus_contracts.pb import secure_aggregation_pb2 as pb

from .secure_federation import JOB, Client, Federation, begin_of, make_parties, trust_in

Message = pb.SecureServerMessage


def frozen(clients: int) -> tuple[Federation, dict[ClientId, Message]]:
    """Return a federation with its updates at the server, and the honest lists of survivors, not delivered yet."""
    job = Federation.of(clients)
    job.begin()
    job.settle()
    job.collect()
    job.freeze()
    return job, job.pause_before("survivors")


def answers_of(job: Federation, messages: dict[ClientId, Message], step: str) -> dict[int, pb.SecureClientMessage]:
    """Deliver messages; return the clients' answers of a step by entry, without giving them to the server."""
    found = {}
    for who, message in messages.items():
        for answer in job.clients[who].receive(message):
            if answer.HasField(step):  # type: ignore[arg-type]
                found[job.server._setup.numbers[who]] = answer
    return found


def consents_for(job: Federation, number: int, consents: dict[int, pb.SecureClientMessage]) -> Message:
    """Return the consents of an entry's neighbours."""
    chosen = job.server._setup.neighbours[number] & consents.keys()
    signed = [pb.SecureSignature(entry=each, signature=consents[each].consent.signature) for each in sorted(chosen)]
    return Message(incarnation=1, consents=pb.SecureConsents(signatures=signed))


def test_a_client_in_both_lists() -> None:
    """Flower's SecAgg+ takes a list of survivors and one of dropouts, and does not check that they are disjoint."""
    job, messages = frozen(6)
    victim = 5
    first = answers_of(job, messages, "consent")
    others = {who: message for who, message in messages.items() if job.server._setup.numbers[who] != victim}
    for message in others.values():
        message.survivors.entries.remove(victim)
    for who, message in others.items():
        (answer,) = job.clients[who].receive(message)
        assert answer.refusal.reason == Reason.CHANGED
    # Neither kind of share is given away after the second list.
    for who in others:
        assert job.clients[who].receive(consents_for(job, job.server._setup.numbers[who], first)) == []


@pytest.mark.parametrize("clients", [9, 40])
def test_lists_that_differ_for_clients_far_from_each_other(clients: int) -> None:
    """Bell et al. compare lists among neighbours. Consents cover the whole list, so distant differences count, too."""
    job, messages = frozen(clients)
    setup = job.server._setup
    victim = clients - 1
    told = set(range(0, clients - 1, 2))
    for who, message in messages.items():
        if setup.numbers[who] in told:
            message.survivors.entries.remove(victim)
    del messages[next(who for who, number in setup.numbers.items() if number == victim)]
    consents = answers_of(job, messages, "consent")
    refused = 0
    for who, number in setup.numbers.items():
        if number != victim:
            (answer,) = job.clients[who].receive(consents_for(job, number, consents))
            refused += answer.refusal.reason == Reason.CONSENTS
    assert refused == clients - 1


def test_different_lists_of_those_that_sent_shares() -> None:
    """The victim's list of peers is shorter, so fewer masks cover its update (the second phase of Bonawitz et al.)."""
    job = Federation.of(9)
    job.begin()
    messages = job.pause_before("shares")
    victim = min(job.clients)
    message = messages[victim]
    message.shares.senders.remove(8)
    message.shares.sealed.__delitem__(7)
    for who, each in messages.items():
        job.deliver(Outgoing(who, each))
    job.collect(sorted(job.clients)[:-1])
    job.freeze()
    job.settle()
    # Its consent is for another list than the server verifies; the others open their sum without its shares.
    fault = next(fault for fault in job.server.faults if fault.who == victim)
    assert fault.reason == Reason.SIGNATURE
    heard = [message for who, message in job.heard if who == victim and message.HasField("unmask")]
    assert heard == []


def test_the_sum_with_and_without_one_client() -> None:
    """The difference of two sums of the same updates is one update. The second set is asked for in every way."""
    job, messages = frozen(6)
    consents = answers_of(job, messages, "consent")
    victim = max(job.clients)
    # The server has all consents, claims to have crashed, and begins again without the victim.
    job.begin(begin_of(2), among=job.clients.keys() - {victim})
    for out in list(job.queue):
        (answer,) = job.clients[out.who].receive(out.message)
        assert answer.refusal.reason == Reason.OPENED
    # The first instance is over for these clients: they do not open its sum either.
    for who in job.clients.keys() - {victim}:
        number = {each: place for place, each in enumerate(sorted(job.clients))}[who]
        signed = [pb.SecureSignature(entry=each, signature=answer.consent.signature)
                  for each, answer in consents.items() if each != number]  # fmt: skip
        assert job.clients[who].receive(Message(incarnation=1, consents=pb.SecureConsents(signatures=signed))) == []


def test_two_instances_at_once_for_one_update() -> None:
    """Half of the clients stay in the first instance while the other half moves on to the second."""
    job, messages = frozen(8)
    stay = sorted(job.clients)[:4]
    move = sorted(job.clients)[4:]
    for who in move:
        job.clients[who].receive(Message(incarnation=2, begin=begin_of(2)))
    consents = answers_of(job, {who: messages[who] for who in stay}, "consent")
    for who in stay:
        (answer,) = job.clients[who].receive(consents_for(job, job.server._setup.numbers[who], consents))
        assert answer.refusal.reason == Reason.CONSENTS
    for who in move:
        assert job.clients[who].receive(messages[who]) == []


def test_a_graph_chosen_by_withheld_nonces() -> None:
    """A server that sees the nonces can drop some until the victim's neighbours suit it. The client counts shares."""
    some = make_parties("cloud", "east")
    places = [(some[0], index) for index in range(13)] + [(some[1], index) for index in range(27)]
    found = 0
    for _ in range(3):
        job = Federation(places, trust_in(some))
        job.begin()
        messages = job.pause_before("nonces")
        if ("cloud", 0) not in messages:
            continue
        server, victim = job.server, job.clients["cloud", 0]
        entries = transcript.entries_digest(server._terms, server._setup.entries)
        nonces = list(messages["cloud", 0].nonces.nonces)
        for withheld in itertools.combinations(range(1, 13), 2):
            members = [number for number in range(40) if number not in withheld]
            seed = transcript.graph_seed(server._terms, entries, [nonces[number] for number in members])
            held = [members[place] for place in graph.neighbours(len(members), seed)[0]]
            if sum(number >= 13 for number in held) >= secure_sums.threshold(len(held) + 1):
                message = messages["cloud", 0]
                for number in withheld:
                    message.nonces.nonces[number] = b""
                (answer,) = victim.receive(message)
                assert answer.refusal.reason == Reason.HOLDERS and "'east'" in answer.refusal.message
                found += 1
                break
    assert found


def test_invented_entries_of_a_genuine_party_do_not_count() -> None:
    """Credentials are public: the server puts them on keys of its own, away from the victim's neighbours."""
    some = make_parties("cloud", "east", "west")
    places = [(some[number % 2], number // 2) for number in range(44)]
    job = Federation(places, trust_in(some, min_parties=3))
    outs = []
    victim = job.clients["cloud", 0]
    entries = []
    for client in job.clients.values():
        (answer,) = client.receive(Message(incarnation=1, begin=begin_of(1)))
        entries.append(answer.advertise.entry)
    stranger = Federation([(some[2], 0)], trust_in(some)).clients["west", 0]
    (answer,) = stranger.receive(Message(incarnation=2, begin=begin_of(2)))  # signed for another instance
    entries.append(answer.advertise.entry)
    entries.sort(key=lambda entry: (entry.pool, entry.index))
    roster = Message(incarnation=1, roster=pb.SecureRoster(entries=entries))
    for client in job.clients.values():
        outs.append((client, client.receive(roster)))
    nonces = {answers[0].reveal.nonce: client for client, answers in outs}
    order = {client.id: nonce for nonce, client in nonces.items()}
    message = Message(incarnation=1, nonces=pb.SecureNonces(nonces=[
        order.get((entry.pool, entry.index), b"") for entry in entries]))  # fmt: skip
    # Without a nonce the invented entry takes no part: two parties are left.
    (refusal,) = victim.receive(message)
    assert refusal.refusal.reason == Reason.PARTIES


def test_an_invented_entry_with_a_nonce_is_found_wherever_it_is() -> None:
    """The only client of the third party is invented, and in many graphs not the victim's neighbour."""
    some = make_parties("cloud", "east", "west")
    away = False
    # Each graph leaves it out with a probability of a quarter.
    for _ in range(80):
        if away:
            break
        places = [(some[number % 2], number // 2) for number in range(44)] + [(some[2], 0)]
        job = Federation(places, trust_in(some, min_parties=3))
        job.begin()
        entries = {}
        for out in list(job.queue):
            (answer,) = job.clients[out.who].receive(out.message)
            entries[out.who] = answer.advertise.entry
        entries["west", 0].signature = bytes(64)
        ordered = [entries[who] for who in sorted(entries)]
        roster = Message(incarnation=1, roster=pb.SecureRoster(entries=ordered))
        nonces = []
        for who in sorted(entries):
            if who == ("west", 0):
                # Its client would refuse its own changed entry; the server knows the nonce that it has invented.
                nonces.append(job.clients[who].protocol._instance._nonce)  # type: ignore[union-attr]
            else:
                nonces.append(job.clients[who].receive(roster)[0].reveal.nonce)
        victim = job.clients["cloud", 0]
        (answer,) = victim.receive(Message(incarnation=1, nonces=pb.SecureNonces(nonces=nonces)))
        assert answer.refusal.reason == Reason.SIGNATURE and "west/0" in answer.refusal.message
        terms = transcript.Terms.of(JOB, begin_of(1))
        seed = transcript.graph_seed(terms, transcript.entries_digest(terms, ordered), nonces)
        away = 44 not in graph.neighbours(45, seed)[0]
    assert away


def test_no_share_lies_at_zero_and_none_at_the_same_point() -> None:
    """A share at 0 is the secret; two at one point let implementations divide by zero, or count one share twice."""
    points = [point(entry) for entry in range(1000)]
    assert min(points) == 1 and len(set(points)) == 1000


def test_consents_to_an_opened_sum_are_no_consents_to_another_round() -> None:
    job, messages = frozen(5)
    old = answers_of(job, messages, "consent")
    for client in job.clients.values():
        client.protocol._opened.clear()  # even if clients forgot
    job.begin(begin_of(2, 2))
    job.settle()
    job.collect()
    job.freeze()
    again = job.pause_before("survivors")
    answers_of(job, again, "consent")
    victim = min(job.clients)
    message = consents_for(job, 0, old)
    message.incarnation = 2
    (answer,) = job.clients[victim].receive(message)
    assert answer.refusal.reason == Reason.CONSENTS


def _opened(job: Federation) -> list[Client]:
    return [client for client in job.clients.values() if client.protocol.opened]


def test_a_round_that_failed_late_is_trained_again_once() -> None:
    job, messages = frozen(5)
    answers_of(job, messages, "consent")
    job.server.deadline()
    assert job.server.phase is Phase.FAILED and len(_opened(job)) == 5
    job.begin(begin_of(2, attempt=1))
    job.settle()
    job.collect()
    job.freeze()
    job.settle()
    assert job.server.phase is Phase.DONE
    for incarnation, attempt in ((3, 1), (4, 2), (5, 0)):
        begin = begin_of(incarnation, attempt=attempt)
        with pytest.raises(Refusal) as error:
            job.clients[min(job.clients)].protocol.receive(Message(incarnation=incarnation, begin=begin))
        assert error.value.reason == (Reason.RETRAINED if attempt == 2 else Reason.OPENED)


def test_an_evaluation_takes_no_tensors() -> None:
    """Under the name of an evaluation, the server could ask for an update outside the rounds."""
    client = next(iter(Federation.of(3).clients.values()))
    begin = begin_of(1, purpose=pb.SecureBegin.EVALUATE)
    (answer,) = client.receive(Message(incarnation=1, begin=begin))
    assert answer.refusal.reason == Reason.LAYOUT


def evaluation_of(incarnation: int, round: int = 2, **fields: object) -> pb.SecureBegin:
    layout = pb.SecureLayout(bits=32, max_clients=1000, scalars=[pb.SecureScalar(name="score", least=-1, most=1)])
    return begin_of(incarnation, round, purpose=pb.SecureBegin.EVALUATE, layout=layout, **fields)


@pytest.mark.parametrize(
    "again", [{}, {"round": 3}, {"base_digest": "cd" * 32}, {"round": 3, "base_digest": "cd" * 32}]
)
def test_measurements_with_and_without_one_client(again: dict[str, Any]) -> None:
    """They are not trained again, so two sums of them, also of slightly different models, give one client's."""
    job = Federation.of(6)
    job.begin(evaluation_of(1))
    job.settle()
    job.collect()
    job.freeze()
    job.pause_before("consents")  # all have consented, and nothing is open yet
    victim = max(job.clients)
    job.begin(evaluation_of(2, **again), among=job.clients.keys() - {victim})
    for out in list(job.queue):
        (answer,) = job.clients[out.who].receive(out.message)
        assert answer.refusal.reason == Reason.OPENED
        assert job.clients[out.who].protocol.begin is None


def test_measurements_are_not_asked_for_as_a_second_attempt() -> None:
    job = Federation.of(3)
    job.begin(evaluation_of(1, attempt=1))
    for out in list(job.queue):
        (answer,) = job.clients[out.who].receive(out.message)
        assert answer.refusal.reason == Reason.RETRAINED


def test_measurements_are_asked_for_again_before_anyone_consents() -> None:
    """Lost clients, or a restart, may make another instance necessary. Updates that were opened do not prevent it."""
    job = Federation.of(5)
    job.run()
    job.begin(evaluation_of(2))
    job.settle()
    job.collect()
    job.begin(evaluation_of(3))
    job.settle()
    job.collect()
    job.freeze()
    job.settle()
    assert job.server.phase is Phase.DONE and not any(client.refusals for client in job.clients.values())
