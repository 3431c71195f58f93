"""A server that breaks the protocol: clients refuse, each time with its reason, and give away nothing."""

from collections.abc import Callable

import pytest

from isthmus.secure_aggregation.parameters import ClientId, Outgoing, UpdateKey
from isthmus.secure_aggregation.refusal import Reason, Refusal
from isthmus.secure_aggregation.transcript import Terms, consent_text, entry_text
from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.wire import parties

from .secure_federation import (
    JOB,
    Client,
    Federation,
    Party,
    begin_of,
    make_parties,
    trust_in,
)

Message = pb.SecureServerMessage
Edit = Callable[[Message], object]


def refused(client: Client, message: Message) -> Reason:
    """Deliver a message that the client must refuse; return the reason."""
    before = len(client.refusals)
    answers = client.receive(message)
    assert [answer.WhichOneof("step") for answer in answers] == ["refusal"]
    assert client.protocol.masks is None and client.protocol.begin is None
    (refusal,) = client.refusals[before:]
    assert "\n" not in str(refusal) and len(str(refusal)) > 20
    return refusal.reason


def victim_of(job: Federation) -> Client:
    return job.clients[min(job.clients)]


def at(step: str, clients: int = 5) -> tuple[Federation, Client, Message]:
    """Return a federation, one of its clients, and the honest server's message of a step, not delivered yet."""
    job = Federation.of(clients)
    job.begin()
    if step in ("survivors", "consents"):
        job.settle()
        job.collect()
        job.freeze()
    messages = job.pause_before(step)
    victim = victim_of(job)
    return job, victim, messages[victim.id]


# ---- roster


def _entry(message: Message, number: int = 1) -> pb.SecureEntry:
    return message.roster.entries[number]


def _drop_own(message: Message) -> None:
    del message.roster.entries[0]


def _repeat(message: Message) -> None:
    message.roster.entries.insert(1, _entry(message))


def _swap(message: Message) -> None:
    first, second = _entry(message, 1), _entry(message, 2)
    copy = pb.SecureEntry()
    copy.CopyFrom(first)
    first.CopyFrom(second)
    second.CopyFrom(copy)


def _other_key(message: Message) -> None:
    _entry(message).mask_key = bytes(31) + b"\x09"


def _high_bit(message: Message) -> None:
    key = _entry(message).mask_key
    _entry(message).mask_key = key[:31] + bytes([key[31] | 0x80])


def _copied_key(message: Message) -> None:
    _entry(message).share_key = _entry(message, 2).share_key


def _other_field(name: str) -> Edit:
    return lambda message: setattr(_entry(message), name, bytes(len(getattr(_entry(message), name))))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_drop_own, Reason.ENTRY),
        (lambda message: setattr(_entry(message, 0), "attempt", 2), Reason.ENTRY),
        (lambda message: setattr(_entry(message, 0), "mask_key", bytes(31) + b"\x09"), Reason.ENTRY),
        (_repeat, Reason.DUPLICATE),
        (_swap, Reason.DUPLICATE),
        (_copied_key, Reason.DUPLICATE),
        (_high_bit, Reason.KEY),
        (lambda message: setattr(_entry(message), "share_key", b"short"), Reason.KEY),
        (_other_key, Reason.SIGNATURE),
        (lambda message: setattr(_entry(message), "instance", "another"), Reason.SIGNATURE),
        (_other_field("nonce_commitment"), Reason.SIGNATURE),
        (_other_field("seed_commitment"), Reason.SIGNATURE),
        (_other_field("signature"), Reason.SIGNATURE),
        (lambda message: setattr(_entry(message).credential, "job_uid", "another"), Reason.CREDENTIAL),
        (lambda message: setattr(_entry(message).credential, "pool", "another"), Reason.CREDENTIAL),
        (lambda message: setattr(_entry(message).credential, "party", "east"), Reason.CREDENTIAL),
        (lambda message: setattr(_entry(message).credential, "party", "nobody"), Reason.CREDENTIAL),
        (lambda message: message.roster.ClearField("entries"), Reason.ENTRY),
        (lambda message: message.roster.entries.__delitem__(slice(2, None)), Reason.CLIENTS),
    ],
)  # fmt: skip
def test_a_changed_roster_is_refused(edit: Edit, reason: Reason) -> None:
    _, victim, message = at("roster")
    edit(message)
    assert refused(victim, message) == reason


def test_clients_that_the_server_invents_are_refused() -> None:
    job, victim, message = at("roster")
    evil = Party.make("east", ["east"])  # the name of a trusted party, with another root
    terms = begin_of(job.incarnation)
    invented = _join(evil, terms, 7)
    message.roster.entries.append(invented)
    message.roster.entries.sort(key=lambda entry: (entry.pool, entry.index))
    assert refused(victim, message) == Reason.CREDENTIAL


def _join(party: Party, begin: pb.SecureBegin, index: int, job_uid: str = JOB) -> pb.SecureEntry:
    """Return an entry that a client of a party makes for an instance."""
    other = Federation([(party, index)], trust_in([party])).clients[next(iter(party.keys)), index].protocol
    (answer,) = other.receive(Message(incarnation=begin.incarnation, begin=begin))
    return answer.advertise.entry


@pytest.mark.parametrize(
    "change",
    [
        {"base_digest": "cd" * 32}, {"round": 2}, {"incarnation": 7},
        {"purpose": pb.SecureBegin.EVALUATE, "layout": pb.SecureLayout(bits=32, max_clients=1000)},
        {"attempt": 1}, {"layout": pb.SecureLayout(bits=32, max_clients=1000, max_examples=99)},
    ],
)  # fmt: skip
def test_clients_that_were_told_other_terms_refuse_each_other(change: dict[str, object]) -> None:
    """A server that gives each client another base model could tell the updates apart in their sum."""
    some = make_parties("cloud", "east", "west")
    job = Federation([(party, 0) for party in some], trust_in(some))
    entries = []
    for number, client in enumerate(job.clients.values()):
        terms = begin_of(**({"incarnation": 1} | (change if number == 1 else {})))  # type: ignore[arg-type]
        (answer,) = client.receive(Message(incarnation=terms.incarnation, begin=terms))
        entries.append(answer.advertise.entry)
    roster = pb.SecureRoster(entries=sorted(entries, key=lambda entry: (entry.pool, entry.index)))
    for client in job.clients.values():
        begin = client.protocol.begin
        assert begin is not None
        assert refused(client, Message(incarnation=begin.incarnation, roster=roster)) == Reason.SIGNATURE


def test_an_entry_of_an_earlier_instance_is_refused() -> None:
    job, _, first = at("roster")
    job.begin()
    messages = job.pause_before("roster")
    victim = victim_of(job)
    message = messages[victim.id]
    _entry(message).CopyFrom(_entry(first))
    assert refused(victim, message) == Reason.SIGNATURE


def test_a_second_roster_is_refused() -> None:
    _, victim, message = at("roster")
    victim.receive(message)
    del message.roster.entries[4]
    assert refused(victim, message) == Reason.CHANGED


@pytest.mark.parametrize("low", [bytes(32), b"\x01" + bytes(31), bytes.fromhex(
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"), bytes.fromhex(
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f")])  # fmt: skip
@pytest.mark.parametrize("field", ["mask_key", "share_key"])
def test_a_public_key_of_small_order_is_refused(low: bytes, field: str) -> None:
    """The secret agreed on with one of these keys is public (RFC 7748, section 6.1), though its owner signed it."""
    some = make_parties("cloud", "east", "west")
    job = Federation([(party, 0) for party in some], trust_in(some))
    job.begin()
    messages = job.pause_before("roster")
    for message in messages.values():
        _entry(message, 2).CopyFrom(resigned(_entry(message, 2), some[2], {field: low}))
    victim = job.clients["cloud", 0]
    if field == "share_key":
        assert refused(victim, messages[victim.id]) == Reason.KEY
        return
    # The mask key is used once the peer has sent shares.
    sealed = {}
    for client in job.clients.values():
        if client.id != ("west", 0):
            (answer,) = client.receive(messages[client.id])
            sealed[client.id] = {each.peer: each.ciphertext for each in answer.shares.sealed}
    shares = pb.SecureShares(senders=[0, 1, 2], sealed=[
        pb.SecureSealed(peer=1, ciphertext=sealed["east", 0][0]), pb.SecureSealed(peer=2, ciphertext=bytes(160))
    ])  # fmt: skip
    assert refused(victim, Message(incarnation=1, shares=shares)) == Reason.KEY


def resigned(entry: pb.SecureEntry, party: Party, fields: dict[str, object], incarnation: int = 1) -> pb.SecureEntry:
    """Return an entry with other fields, signed by its (malicious) client."""
    changed = pb.SecureEntry()
    changed.CopyFrom(entry)
    for name, value in fields.items():
        setattr(changed, name, value)
    terms = Terms.of(JOB, begin_of(incarnation))
    changed.signature = party.signer(next(iter(party.keys))).sign(entry_text(terms, changed))
    return changed


# ---- trust


@pytest.mark.parametrize(
    ("places", "min_parties", "min_clients", "reason"),
    [
        ([2, 1, 1], 4, 3, Reason.PARTIES),
        ([4], 2, 3, Reason.PARTIES),
        ([1, 1, 1], 1, 4, Reason.CLIENTS),
        ([1, 1], 1, 3, Reason.CLIENTS),
        ([1, 3], 1, 3, Reason.HOLDERS),  # 3 of 4 shares are the threshold
        ([1, 1, 8], 1, 3, Reason.HOLDERS),
        ([1, 2], 2, 3, Reason.ALONE),  # the other party has 2 of 3 shares: it can subtract, but not open
    ],
)
def test_a_roster_that_the_site_does_not_trust_is_refused(
    places: list[int], min_parties: int, min_clients: int, reason: Reason
) -> None:
    some = make_parties("cloud", "east", "west")[: len(places)]
    members = [(party, index) for party, count in zip(some, places, strict=True) for index in range(count)]
    job = Federation(members, trust_in(some, min_parties, min_clients))
    victim = victim_of(job)
    entries = [_join_of(client) for client in job.clients.values()]
    roster = pb.SecureRoster(entries=sorted(entries, key=lambda entry: (entry.pool, entry.index)))
    assert refused(victim, Message(incarnation=1, roster=roster)) == reason
    if reason is Reason.HOLDERS:
        assert some[-1].name in str(victim.refusals[-1])


def _join_of(client: Client) -> pb.SecureEntry:
    (answer,) = client.receive(Message(incarnation=1, begin=begin_of(1)))
    return answer.advertise.entry


def test_a_credential_of_another_pool_or_job_or_of_no_trusted_root_is_refused() -> None:
    some = make_parties("cloud", "east", "west")
    stray = {
        "job": parties.issue(some[2].root, "west", "another-job", "west"),
        "pool": parties.issue(some[2].root, "west", JOB, "other"),
        "root": parties.issue(parties.new_root()[0], "west", JOB, "west"),
    }
    for key, credential in stray.values():
        job = Federation([(party, 0) for party in some], trust_in(some))
        job.begin()
        message = job.pause_before("roster")["cloud", 0]
        odd = Party("west", some[2].root, some[2].public, {"west": (key, credential)})
        other = _entry(message, 2)
        other.credential.public_key = credential.public_key
        other.credential.signature = credential.signature
        _entry(message, 2).CopyFrom(resigned(other, odd, {}))
        assert refused(job.clients["cloud", 0], message) == Reason.CREDENTIAL


# ---- graph


def _other_nonce(message: Message) -> None:
    message.nonces.nonces[3] = bytes(32)


def _own_nonce_lost(message: Message) -> None:
    message.nonces.nonces[0] = b""


def _most_nonces_lost(message: Message) -> None:
    message.nonces.nonces[2:] = [b""] * (len(message.nonces.nonces) - 2)


def _nonces_swapped(message: Message) -> None:
    nonces = message.nonces.nonces
    nonces[3], nonces[4] = nonces[4], nonces[3]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_other_nonce, Reason.NONCE),
        (_own_nonce_lost, Reason.NONCE),
        (_nonces_swapped, Reason.NONCE),
        (lambda message: message.nonces.nonces.append(bytes(32)), Reason.NONCE),
        (lambda message: message.nonces.ClearField("nonces"), Reason.NONCE),
        (_most_nonces_lost, Reason.CLIENTS),
    ],
)
def test_a_forged_graph_is_refused(edit: Edit, reason: Reason) -> None:
    _, victim, message = at("nonces", 33)
    edit(message)
    assert refused(victim, message) == reason


def test_clients_with_different_graphs_cannot_open_each_others_shares() -> None:
    """The server withholds a nonce from one client, which then has other neighbours."""
    job = Federation.of(36)
    job.begin()
    messages = job.pause_before("nonces")
    victim = victim_of(job)
    # An entry that is not the victim's neighbour would do as well; shares are bound to the digest of the whole graph.
    messages[victim.id].nonces.nonces[35] = b""
    for who, message in messages.items():
        for answer in job.clients[who].receive(message):
            job.answer(who, answer)
    job.settle()
    (fault,) = [fault for fault in job.server.faults if fault.who == victim.id]
    assert fault.reason == Reason.SHARES


# ---- shares


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda message: message.shares.senders.remove(0), Reason.SENDERS),
        (lambda message: message.shares.senders.append(4), Reason.SENDERS),
        (lambda message: message.shares.senders.append(9), Reason.SENDERS),
        (lambda message: message.shares.senders.reverse(), Reason.SENDERS),
        (lambda message: message.shares.senders.__delitem__(slice(3, None)), Reason.SENDERS),
        (lambda message: message.shares.senders.remove(2), Reason.SHARES),
        (lambda message: message.shares.sealed.__delitem__(1), Reason.SHARES),
        (lambda message: message.shares.sealed.append(message.shares.sealed[0]), Reason.SHARES),
        (lambda message: setattr(message.shares.sealed[0], "peer", 0), Reason.SHARES),
    ],
)
def test_false_senders_of_shares_are_refused(edit: Edit, reason: Reason) -> None:
    _, victim, message = at("shares")
    edit(message)
    assert refused(victim, message) == reason


def test_shares_that_were_swapped_are_reported() -> None:
    _, victim, message = at("shares")
    first, second = message.shares.sealed[0], message.shares.sealed[1]
    first.ciphertext, second.ciphertext = second.ciphertext, first.ciphertext
    (answer,) = victim.receive(message)
    assert list(answer.complaint.entries) == [1, 2]


# ---- survivors and consents


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda entries: entries.remove(0), Reason.SURVIVORS),
        (lambda entries: entries.append(4), Reason.SURVIVORS),
        (lambda entries: entries.append(9), Reason.SURVIVORS),
        (lambda entries: entries.reverse(), Reason.SURVIVORS),
        (lambda entries: entries.__delitem__(slice(3, None)), Reason.SURVIVORS),
        (lambda entries: entries.clear(), Reason.SURVIVORS),
    ],
)
def test_false_survivors_are_refused(edit: Callable[[list[int]], object], reason: Reason) -> None:
    _, victim, message = at("survivors")
    edit(message.survivors.entries)
    assert refused(victim, message) == reason
    assert not victim.protocol.opened


def test_survivors_that_have_sent_no_shares_are_refused() -> None:
    job = Federation.of(6)
    job.begin()
    messages = job.pause_before("roster")
    job.dead.add(max(job.clients))
    for who, message in messages.items():
        job.deliver(Outgoing(who, message))
    job.settle()
    job.collect()
    job.freeze()
    victim = victim_of(job)
    message = job.pause_before("survivors")[victim.id]
    assert list(message.survivors.entries) == [0, 1, 2, 3, 4]
    message.survivors.entries.append(5)
    assert refused(victim, message) == Reason.SURVIVORS


def test_a_client_that_sent_no_update_is_no_survivor() -> None:
    job = Federation.of(4)
    job.begin()
    job.settle()
    victim = victim_of(job)
    message = Message(incarnation=1, survivors=pb.SecureSurvivors(entries=[0, 1, 2, 3]))
    assert refused(victim, message) == Reason.UNCONTRIBUTED


@pytest.mark.parametrize(
    ("places", "survivors", "min_parties", "min_clients", "reason"),
    [
        ([2, 2, 1], [0, 1, 2, 3], 3, 3, Reason.PARTIES),
        ([3, 3, 3], [0, 1, 2, 3, 4, 5, 6], 1, 8, Reason.CLIENTS),
        ([2, 2], [0, 2, 3], 2, 3, Reason.SURVIVORS),
    ],
)
def test_survivors_that_the_site_does_not_trust_are_refused(
    places: list[int], survivors: list[int], min_parties: int, min_clients: int, reason: Reason
) -> None:
    some = make_parties("cloud", "east", "west")[: len(places)]
    members = [(party, index) for party, count in zip(some, places, strict=True) for index in range(count)]
    job = Federation(members, trust_in(some, min_parties, min_clients))
    job.begin()
    job.settle()
    job.collect()
    message = Message(incarnation=1, survivors=pb.SecureSurvivors(entries=survivors))
    assert refused(victim_of(job), message) == reason


def test_fewer_survivors_than_the_noise_needs_are_refused() -> None:
    job = Federation.of(5)
    begin = begin_of(1)
    begin.layout.noise.contributors = 5
    job.begin(begin)
    job.settle()
    job.collect()
    message = Message(incarnation=1, survivors=pb.SecureSurvivors(entries=[0, 1, 2, 3]))
    assert refused(victim_of(job), message) == Reason.SURVIVORS


def test_a_second_list_of_survivors_is_refused() -> None:
    """In the first the victim's neighbour has survived, in the second it is a dropout: both shares would open it."""
    _, victim, message = at("survivors")
    assert victim.receive(message)[0].HasField("consent")
    message.survivors.entries.remove(4)
    assert refused(victim, message) == Reason.CHANGED
    assert victim.protocol.opened


def _too_few(message: Message, _: Federation) -> None:
    del message.consents.signatures[2:]


def _repeated(message: Message, _: Federation) -> None:
    for each in message.consents.signatures:
        each.CopyFrom(message.consents.signatures[0])


def _forged(message: Message, _: Federation) -> None:
    for each in message.consents.signatures:
        each.signature = bytes(64)


def _swapped_signatures(message: Message, _: Federation) -> None:
    signatures = [each.signature for each in message.consents.signatures]
    for each, signature in zip(message.consents.signatures, signatures[1:] + signatures[:1], strict=True):
        each.signature = signature


def _renumbered(message: Message, _: Federation) -> None:
    for each in message.consents.signatures:
        each.entry += 10


def _of_another_incarnation(message: Message, job: Federation) -> None:
    roster = job.server._setup
    for each in message.consents.signatures:
        text = consent_text(Terms.of(JOB, begin_of(2)), roster.digest, roster.senders, roster.survivors, each.entry)
        party = job.parties[roster.entries[each.entry].credential.party]
        each.signature = party.signer(party.name).sign(text)


@pytest.mark.parametrize(
    "edit", [_too_few, _repeated, _forged, _swapped_signatures, _renumbered, _of_another_incarnation]
)
def test_survivors_without_enough_consents_are_refused(edit: Callable[[Message, Federation], None]) -> None:
    job, victim, message = at("consents", 7)
    edit(message, job)
    assert refused(victim, message) == Reason.CONSENTS
    assert victim.protocol.opened


def test_consents_to_another_list_of_survivors_do_not_count() -> None:
    """The victim's list of survivors names all, the lists of its neighbours all but the victim."""
    job = Federation.of(7)
    job.begin()
    job.settle()
    job.collect()
    job.freeze()
    messages = job.pause_before("survivors")
    victim = victim_of(job)
    consents = []
    for number, who in enumerate(sorted(job.clients)):
        message = messages[who]
        if who != victim.id:
            message.survivors.entries.remove(0)
        (answer,) = job.clients[who].receive(message)
        if who != victim.id:
            consents.append(pb.SecureSignature(entry=number, signature=answer.consent.signature))
    forged = Message(incarnation=1, consents=pb.SecureConsents(signatures=consents))
    assert refused(victim, forged) == Reason.CONSENTS


def test_a_server_that_splits_its_clients_opens_nothing() -> None:
    """Half of the clients get a list with the last client among the survivors, half get one without it."""
    job = Federation.of(8)
    job.begin()
    job.settle()
    job.collect()
    job.freeze()
    messages = job.pause_before("survivors")
    signed: dict[bool, list[pb.SecureSignature]] = {True: [], False: []}
    for number, who in enumerate(sorted(job.clients)[:-1]):
        honest = number % 2 == 0
        if not honest:
            messages[who].survivors.entries.remove(7)
        (answer,) = job.clients[who].receive(messages[who])
        signed[honest].append(pb.SecureSignature(entry=number, signature=answer.consent.signature))
    for number, who in enumerate(sorted(job.clients)[:-1]):
        message = Message(incarnation=1, consents=pb.SecureConsents(signatures=signed[number % 2 == 0]))
        assert refused(job.clients[who], message) == Reason.CONSENTS


def _split(job: Federation, lists: dict[ClientId, list[int]]) -> dict[ClientId, bytes]:
    """Give each client its own list of survivors; return the consents of those that agree."""
    messages = job.pause_before("survivors")
    signed = {}
    for who, entries in lists.items():
        del messages[who].survivors.entries[:]
        messages[who].survivors.entries.extend(entries)
        (answer,) = job.clients[who].receive(messages[who])
        if answer.HasField("consent"):
            signed[who] = answer.consent.signature
    return signed


def test_a_consent_counts_for_its_signer_only() -> None:
    """All clients of one pool sign with one key, and the server returns each its own consent as that of all others."""
    (party,) = make_parties("cloud")
    job = Federation([(party, index) for index in range(10)], trust_in([party]))
    job.begin()
    job.settle()
    job.collect()
    job.freeze()
    everyone = list(range(10))
    without = {who: [each for each in everyone if each not in (who[1] + 1, (who[1] + 2) % 10)] for who in job.clients}
    signed = _split(job, {who: entries for who, entries in without.items() if who[1] in entries})
    assert signed
    for who, signature in signed.items():
        copies = [pb.SecureSignature(entry=entry, signature=signature) for entry in everyone]
        message = Message(incarnation=1, consents=pb.SecureConsents(signatures=copies))
        assert refused(job.clients[who], message) == Reason.CONSENTS


def test_one_other_party_and_a_lying_server_open_nothing() -> None:
    """Three of seven clients are of the server's party, and agree to both lists: all, and all but the victim."""
    site, cloud = make_parties("site", "cloud")
    places = [(site, index) for index in range(4)] + [(cloud, index) for index in range(3)]
    job = Federation(places, trust_in([site, cloud], min_parties=2))
    job.begin()
    job.settle()
    job.collect()
    job.freeze()
    roster = job.server._setup
    victim = roster.numbers["site", 0]
    everyone = list(range(7))
    others = [entry for entry in everyone if entry != victim]
    lists = {("site", 0): everyone, ("site", 1): everyone, ("site", 2): others, ("site", 3): others}
    signed = _split(job, lists)
    terms = Terms.of(JOB, begin_of(1))
    opened = 0
    for who, entries in lists.items():
        if who not in signed:
            continue
        alike = [each for each in signed if lists[each] == entries]
        consents = [pb.SecureSignature(entry=roster.numbers[each], signature=signed[each]) for each in alike]
        for index in range(3):
            number = roster.numbers["cloud", index]
            text = consent_text(terms, roster.digest, roster.senders, entries, number)
            consents.append(pb.SecureSignature(entry=number, signature=cloud.signer("cloud").sign(text)))
        message = Message(incarnation=1, consents=pb.SecureConsents(signatures=consents))
        answers = job.clients[who].receive(message)
        opened += any(answer.HasField("unmask") for answer in answers)
    assert opened == 0


# ---- instances and order


def test_a_replayed_or_changed_incarnation_is_refused() -> None:
    client = victim_of(Federation.of(3))
    client.receive(Message(incarnation=5, begin=begin_of(5)))
    (answer,) = client.receive(Message(incarnation=4, begin=begin_of(4)))
    assert answer.refusal.reason == Reason.INCARNATION
    assert client.protocol.begin == begin_of(5)
    client.receive(Message(incarnation=6, begin=begin_of(6)))
    assert refused(client, Message(incarnation=6, begin=begin_of(6, 2))) == Reason.CHANGED
    assert refused(client, Message(incarnation=8, begin=begin_of(7))) == Reason.INCARNATION
    assert client.receive(Message(incarnation=6, begin=begin_of(6))) == []


def test_a_restarted_client_refuses_what_it_has_seen() -> None:
    some = make_parties("cloud", "east", "west")
    client = Federation([(some[0], 0)], trust_in(some)).clients["cloud", 0]
    client.protocol.seen = 9
    with pytest.raises(Refusal, match="replayed"):
        client.protocol.receive(Message(incarnation=9, begin=begin_of(9)))


def test_an_opened_update_is_not_asked_for_again() -> None:
    job = Federation.of(4)
    job.run()
    victim = victim_of(job)
    assert victim.protocol.opened
    for incarnation, change in enumerate(({}, {"base_digest": "cd" * 32}), 2):
        message = Message(incarnation=incarnation, begin=begin_of(incarnation, **change))  # type: ignore[arg-type]
        with pytest.raises(Refusal) as error:
            victim.protocol.receive(message)
        assert error.value.reason is Reason.OPENED
    again = begin_of(9, attempt=1)
    assert victim.receive(Message(incarnation=9, begin=again))[0].HasField("advertise")
    assert not victim.protocol.opened


def test_a_round_is_trained_twice_at_most() -> None:
    client = victim_of(Federation.of(3))
    assert refused(client, Message(incarnation=1, begin=begin_of(1, attempt=2))) == Reason.RETRAINED


def test_a_round_before_an_opened_one_is_refused() -> None:
    job = Federation.of(4)
    job.begin(begin_of(1, 7))
    job.settle()
    job.collect()
    job.freeze()
    job.settle()
    assert refused(victim_of(job), Message(incarnation=2, begin=begin_of(2, 6))) == Reason.ROUND
    assert victim_of(job).receive(Message(incarnation=3, begin=begin_of(3, 8)))


@pytest.mark.parametrize(
    "change",
    [
        {"purpose": pb.SecureBegin.PURPOSE_UNSPECIFIED}, {"round": 0}, {"base_digest": ""}, {"base_digest": "a" * 300},
        {"phase_seconds": float("nan")}, {"phase_seconds": 0}, {"layout": pb.SecureLayout(bits=8, max_clients=9)},
        {"layout": pb.SecureLayout(bits=32, max_clients=2)},
    ],
)  # fmt: skip
def test_a_malformed_begin_is_refused(change: dict[str, object]) -> None:
    client = victim_of(Federation.of(3))
    assert refused(client, Message(incarnation=1, begin=begin_of(1, **change))) == Reason.LAYOUT  # type: ignore[arg-type]


def test_more_clients_than_the_ring_holds_are_refused() -> None:
    job = Federation.of(5)
    begin = begin_of(1)
    begin.layout.max_clients = 4
    job.begin(begin)
    victim = victim_of(job)
    assert refused(victim, job.pause_before("roster")[victim.id]) == Reason.CLIENTS


@pytest.mark.parametrize(
    "step",
    [
        {"nonces": pb.SecureNonces(nonces=[b""] * 5)}, {"shares": pb.SecureShares(senders=[0])},
        {"survivors": pb.SecureSurvivors(entries=[0, 1, 2])}, {"consents": pb.SecureConsents()}, {},
    ],
)  # fmt: skip
def test_a_step_out_of_order_is_refused(step: dict[str, object]) -> None:
    _, victim, _ = at("roster")
    assert refused(victim, Message(incarnation=1, **step)) == Reason.ORDER  # type: ignore[arg-type]


def test_a_step_before_its_begin_is_refused_and_an_end_ignored() -> None:
    client = victim_of(Federation.of(3))
    assert client.receive(Message(incarnation=1, end=pb.SecureEnd())) == []
    assert refused(client, Message(incarnation=1, roster=pb.SecureRoster())) == Reason.ORDER


def test_masks_cover_one_update_of_the_right_model() -> None:
    job = Federation.of(3)
    job.begin()
    victim = victim_of(job)
    with pytest.raises(Refusal) as error:
        victim.protocol.contributed(UpdateKey(1, "ab" * 32, 0, "x"))
    assert error.value.reason is Reason.ORDER
    job.settle()
    key = victim.key()
    for other in (key._replace(round=2), key._replace(base_digest="cd"), key._replace(attempt=1)):
        with pytest.raises(Refusal) as error:
            victim.protocol.contributed(other)
        assert error.value.reason is Reason.BASE
    victim.protocol.contributed(key)
    victim.protocol.contributed(key)
    with pytest.raises(Refusal) as error:
        victim.protocol.contributed(key._replace(digest="another"))
    assert error.value.reason is Reason.REUSE


def test_an_update_opened_by_another_instance_is_not_covered_again() -> None:
    """The server begins a second instance between the survivors' consent and the client's push to it."""
    job = Federation.of(4)
    job.begin()
    job.settle()
    job.collect()
    job.freeze()
    job.settle()
    victim = victim_of(job)
    with pytest.raises(Refusal):
        victim.protocol.receive(Message(incarnation=2, begin=begin_of(2)))
    with pytest.raises(Refusal) as error:
        victim.protocol.contributed(UpdateKey(1, "ab" * 32, 0, "x"))
    assert error.value.reason is Reason.ORDER


def test_an_answer_is_repeated_with_the_same_bytes() -> None:
    job = Federation.of(34)
    job.begin()
    victim = victim_of(job)
    record: list[tuple[Message, list[pb.SecureClientMessage]]] = []
    receive = victim.receive

    def recording(message: Message) -> list[pb.SecureClientMessage]:
        answers = receive(message)
        record.append((message, answers))
        return answers

    victim.receive = recording  # type: ignore[method-assign]
    job.settle()
    job.collect()
    job.freeze()
    job.pause_before("end")
    assert [message.WhichOneof("step") for message, _ in record] == [
        "begin", "roster", "nonces", "shares", "survivors", "consents"
    ]  # fmt: skip
    for message, answers in record:
        assert victim.protocol.receive(message) == answers
