"""Clients that break the protocol: the server drops them with a reason, and goes on with the others."""

import secrets
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.secure_aggregation.parameters import REFUSED, ClientId, Outgoing, Participant, Phase
from isthmus.secure_aggregation.refusal import Reason
from isthmus.secure_aggregation.server import ServerProtocol
from isthmus.secure_aggregation.transcript import Terms, entry_text
from isthmus_contracts import secure_sums
from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.wire import parties
from isthmus_contracts.wire.parties import PartyError
from tests.integration.federation.protocol_messages import EDITS as EDITS_OF_BYTES
from tests.integration.federation.protocol_messages import arbitrary, edited

from .secure_federation import JOB, Federation, begin_of, equal

Answer = pb.SecureClientMessage
Edit = Callable[[Answer], object]


def lying(job: Federation, liar: ClientId, step: str, edit: Edit) -> None:
    """Run an instance in which one client changes its message of a step."""
    receive = job.clients[liar].receive

    def lie(message: pb.SecureServerMessage) -> list[Answer]:
        answers = []
        for answer in receive(message):
            copy = Answer()
            copy.CopyFrom(answer)
            if answer.WhichOneof("step") == step:
                edit(copy)
            answers.append(copy)
        return answers

    job.clients[liar].receive = lie  # type: ignore[method-assign]
    job.run()


def signed(job: Federation, liar: ClientId, edit: Callable[[pb.SecureEntry], object]) -> Edit:
    """Return a change of an entry after which its signature is right."""

    def change(answer: Answer) -> None:
        entry = answer.advertise.entry
        edit(entry)
        party = job.parties[liar[0]]
        entry.signature = party.signer(liar[0]).sign(entry_text(Terms.of(JOB, begin_of(1)), entry))

    return change


def _low_order(field: str) -> Callable[[pb.SecureEntry], object]:
    return lambda entry: setattr(entry, field, b"\x01" + bytes(31))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda entry: setattr(entry, "pool", "other"), Reason.ENTRY),
        (lambda entry: setattr(entry, "index", 0), Reason.ENTRY),
        (lambda entry: setattr(entry, "attempt", 9), Reason.ENTRY),
        (lambda entry: setattr(entry, "instance", "other"), Reason.ENTRY),
        (lambda entry: setattr(entry, "mask_key", b""), Reason.KEY),
        (lambda entry: setattr(entry, "share_key", bytes(33)), Reason.KEY),
        (lambda entry: setattr(entry, "share_key", b"\xff" * 32), Reason.KEY),
        (_low_order("mask_key"), Reason.KEY),
        (_low_order("share_key"), Reason.KEY),
        (lambda entry: setattr(entry, "share_key", entry.mask_key), Reason.DUPLICATE),
        (lambda entry: setattr(entry, "nonce_commitment", b"x"), Reason.KEY),
        (lambda entry: entry.ClearField("seed_commitment"), Reason.KEY),
        (lambda entry: entry.ClearField("credential"), Reason.CREDENTIAL),
        (lambda entry: setattr(entry.credential, "job_uid", "another"), Reason.CREDENTIAL),
        (lambda entry: setattr(entry.credential, "pool", "another"), Reason.CREDENTIAL),
        (lambda entry: setattr(entry.credential, "public_key", bytes(32)), Reason.CREDENTIAL),
        (lambda entry: setattr(entry.credential, "public_key", secrets.token_bytes(32)), Reason.SIGNATURE),
        (lambda entry: setattr(entry.credential, "party", "x\n" * 2000), Reason.SIZE),
    ],
)
def test_a_malformed_entry_drops_its_client(edit: Callable[[pb.SecureEntry], object], reason: Reason) -> None:
    job = Federation.of(6)
    liar = max(job.clients)
    lying(job, liar, "advertise", signed(job, liar, edit))
    assert [(fault.who, fault.reason) for fault in job.server.faults] == [(liar, reason)]
    assert job.server.phase is Phase.DONE, job.server.failure
    assert liar not in job.server.survivors and len(job.server.survivors) == 5
    assert equal(job.opened(), job.expected())


def test_a_client_of_an_unknown_party_is_left_out_next_time() -> None:
    """The server knows no roots. All others refuse the roster, and blame the entry."""
    job = Federation.of(6)
    liar = max(job.clients)
    receive = job.clients[liar].receive
    claim = signed(job, liar, lambda entry: setattr(entry.credential, "party", "unknown"))

    def lie(message: pb.SecureServerMessage) -> list[Answer]:
        answers = receive(message)
        for answer in answers:
            if answer.HasField("advertise"):
                claim(answer)
        return answers

    job.clients[liar].receive = lie  # type: ignore[method-assign]
    job.begin()
    job.settle()
    assert job.server.phase is Phase.FAILED
    assert job.server.culprits == {liar}
    blame = [fault for fault in job.server.faults if fault.reason == Reason.BLAMED]
    assert [fault.who for fault in blame] == [liar] and "unknown" in blame[0].message
    job.begin(among=job.clients.keys() - job.server.culprits)
    job.settle()
    job.collect()
    job.freeze()
    job.settle()
    assert equal(job.opened(), job.expected())


def test_a_forged_signature_and_a_copied_key_drop_their_client() -> None:
    job = Federation.of(6)
    liar = max(job.clients)
    lying(job, liar, "advertise", lambda answer: setattr(answer.advertise.entry, "signature", bytes(64)))
    assert [fault.reason for fault in job.server.faults] == [Reason.SIGNATURE]
    job = Federation.of(6)

    def copy(entry: pb.SecureEntry) -> None:
        entry.mask_key = job.server._answers.entries[min(job.clients)].mask_key

    lying(job, liar, "advertise", signed(job, liar, copy))
    assert [(fault.who, fault.reason) for fault in job.server.faults] == [(liar, Reason.DUPLICATE)]
    assert job.server.phase is Phase.DONE


def test_the_server_checks_credentials_where_it_knows_the_roots() -> None:
    job = Federation.of(5)
    strange = parties.issue(parties.new_root()[0], "west", JOB, "west")
    liar = max(job.clients)
    job.clients[liar].protocol._identity = job.clients[liar].protocol._identity.__class__(
        JOB, "west", liar[1], 1, "i", parties.Signer(*strange)
    )

    def check(credential: parties.Credential) -> None:
        parties.verify(credential, job.parties[credential.party].public)

    job.begin(check_credential=check)  # type: ignore[arg-type]
    job.settle()
    assert [(fault.who, fault.reason) for fault in job.server.faults] == [(liar, Reason.CREDENTIAL)]
    assert len(job.server.contributors_possible) == 4
    with pytest.raises(PartyError):
        check(strange[1])


def _first_sealed(answer: Answer) -> pb.SecureSealed:
    return answer.shares.sealed[0]


@pytest.mark.parametrize(
    ("step", "edit", "reason"),
    [
        ("reveal", lambda answer: setattr(answer.reveal, "nonce", bytes(32)), Reason.NONCE),
        ("reveal", lambda answer: setattr(answer.reveal, "nonce", b""), Reason.NONCE),
        ("reveal", lambda answer: setattr(answer.reveal, "nonce", bytes(100_000)), Reason.SIZE),
        ("shares", lambda answer: answer.shares.ClearField("sealed"), Reason.SHARES),
        ("shares", lambda answer: answer.shares.sealed.__delitem__(3), Reason.SHARES),
        ("shares", lambda answer: answer.shares.sealed.append(_first_sealed(answer)), Reason.SHARES),
        ("shares", lambda answer: setattr(_first_sealed(answer), "peer", 4_000_000_000), Reason.SHARES),
        ("shares", lambda answer: setattr(_first_sealed(answer), "ciphertext", b"short"), Reason.SHARES),
        ("shares", lambda answer: setattr(_first_sealed(answer), "ciphertext", bytes(1 << 20)), Reason.SIZE),
        ("consent", lambda answer: setattr(answer.consent, "signature", bytes(64)), Reason.SIGNATURE),
        ("consent", lambda answer: setattr(answer.consent, "signature", b""), Reason.SIGNATURE),
        ("unmask", lambda answer: answer.unmask.ClearField("shares"), Reason.SHARES),
        ("unmask", lambda answer: answer.unmask.shares.__delitem__(0), Reason.SHARES),
        ("unmask", lambda answer: answer.unmask.shares.append(answer.unmask.shares[0]), Reason.SHARES),
        ("unmask", lambda answer: setattr(answer.unmask.shares[0], "self_seed_share", b"x"), Reason.SHARES),
        ("unmask", lambda answer: setattr(answer.unmask.shares[0], "mask_key_share", bytes(66)), Reason.SHARES),
        ("unmask", lambda answer: setattr(answer, "incarnation", 9), Reason.INCARNATION),
    ],
)
def test_a_malformed_answer_drops_its_client(step: str, edit: Edit, reason: Reason) -> None:
    job = Federation.of(36 if step == "reveal" else 7)
    # The first one, whose answer is needed: others' answers may be enough to recover everything.
    liar = min(job.clients)
    lying(job, liar, step, edit)
    assert [(fault.who, fault.reason) for fault in job.server.faults] == [(liar, reason)]
    assert liar in job.server.dropped and liar in job.server.culprits
    assert job.server.phase is Phase.DONE, job.server.failure
    assert equal(job.opened(), job.expected())
    assert (liar in job.server.survivors) == (step in ("consent", "unmask"))


def _bad_shares(answer: Answer) -> None:
    for share in answer.unmask.shares:
        share.self_seed_share = secrets.token_bytes(66)[1:] + b"\0" if share.self_seed_share else b""


def _shift_shares(answer: Answer) -> None:
    """Give another point's value: valid numbers of the field that do not fit."""
    values = [share.self_seed_share for share in answer.unmask.shares]
    for share, value in zip(answer.unmask.shares, values[1:] + values[:1], strict=True):
        share.self_seed_share = value


def _too_large(answer: Answer) -> None:
    for share in answer.unmask.shares:
        share.self_seed_share = b"\xff" * 66


@pytest.mark.parametrize("edit", [_bad_shares, _shift_shares, _too_large])
def test_wrong_shares_of_one_client_are_found(edit: Edit) -> None:
    """With its shares, the first interpolation gives a wrong seed; the commitment tells."""
    job = Federation.of(10)
    liar = min(job.clients)
    lying(job, liar, "unmask", edit)
    assert job.server.phase is Phase.DONE, job.server.failure
    assert equal(job.opened(), job.expected())
    assert {(fault.who, fault.reason) for fault in job.server.faults} == {(liar, Reason.SHARES)}


def test_a_client_that_gives_away_false_shares_is_named() -> None:
    """Its shares open and are well-formed, but do not give the seed that it has committed to."""
    job = Federation.of(6)
    liar = min(job.clients)
    protocol = job.clients[liar].protocol

    def run() -> None:
        job.begin()
        messages = job.pause_before("roster")
        instance = protocol._instance
        assert instance is not None
        instance._seed = bytes(32)
        for who, message in messages.items():
            job.deliver(Outgoing(who, message))
        job.settle()
        job.collect()
        job.freeze()
        job.settle()

    run()
    assert job.server.phase is Phase.FAILED
    assert job.server.culprits == {liar}
    assert "cloud/0" in job.server.failure
    assert not [client for client in job.clients.values() if client.refusals]


def test_a_client_whose_shares_cannot_be_opened_ends_the_instance_before_anything_is_opened() -> None:
    job = Federation.of(6)
    liar = min(job.clients)

    def spoil(answer: Answer) -> None:
        for sealed in answer.shares.sealed:
            sealed.ciphertext = bytes(len(sealed.ciphertext))

    job.begin()
    receive = job.clients[liar].receive
    job.clients[liar].receive = lambda message: [_spoiled(answer, spoil) for answer in receive(message)]  # type: ignore[method-assign]
    job.settle()
    assert job.server.phase is Phase.FAILED
    assert job.server.culprits == {liar}
    assert not [client for client in job.clients.values() if client.protocol.opened]
    job.begin(among=job.clients.keys() - job.server.culprits)
    job.settle()
    job.collect()
    job.freeze()
    job.settle()
    assert equal(job.opened(), job.expected())


def _spoiled(answer: Answer, edit: Edit) -> Answer:
    copy = Answer()
    copy.CopyFrom(answer)
    if copy.HasField("shares"):
        edit(copy)
    return copy


def test_one_complaint_does_not_end_an_instance() -> None:
    job = Federation.of(8)
    liar = min(job.clients)
    job.begin()
    messages = job.pause_before("shares")
    message = messages[liar]
    message.shares.sealed[2].ciphertext = bytes(len(message.shares.sealed[2].ciphertext))
    for who, each in messages.items():
        job.deliver(Outgoing(who, each))
    job.settle()
    assert job.server._setup.unusable == {3: {0}}
    job.collect()
    job.freeze()
    job.settle()
    assert job.server.phase is Phase.DONE and not job.server.faults
    assert equal(job.opened(), job.expected())


@pytest.mark.parametrize("entries", [[], [0], [4_000_000_000]])
def test_a_complaint_about_nobody_is_a_fault(entries: list[int]) -> None:
    job = Federation.of(5)
    job.begin()
    job.settle()
    liar = min(job.clients)
    job.answer(liar, Answer(incarnation=1, complaint=pb.SecureComplaint(entries=entries)))
    assert [(fault.who, fault.reason) for fault in job.server.faults] == [(liar, Reason.SHARES)]


def test_objections_of_a_minority_blame_nobody() -> None:
    job = Federation.of(6)
    job.begin()
    job.settle()
    for who in sorted(job.clients)[:2]:
        refusal = pb.SecureRefusal(reason="credential", message="no\nway", entries=[5, 5, 77])
        job.answer(who, Answer(incarnation=1, refusal=refusal))
    assert [fault.reason for fault in job.server.faults] == [REFUSED, REFUSED]
    assert job.server.faults[0].message == "credential: no way"
    assert not job.server.culprits
    assert job.server.phase is Phase.COLLECT


def test_messages_of_strangers_and_of_the_dropped_have_no_effect() -> None:
    job = Federation.of(5)
    job.begin()
    consent = Answer(incarnation=1, consent=pb.SecureConsent(signature=bytes(64)))
    assert job.server.receive(("cloud", 99), consent) == []
    assert [(fault.who, fault.reason) for fault in job.server.faults] == [(("cloud", 99), Reason.STRANGER)]
    assert not job.server.culprits
    who = min(job.clients)
    job.answer(who, consent)
    assert [(fault.who, fault.reason) for fault in job.server.faults[1:]] == [(who, Reason.ORDER)]
    job.answer(who, consent)
    assert len(job.server.faults) == 2
    job.settle()
    assert job.server.phase is Phase.COLLECT and len(job.server.contributors_possible) == 4


def test_a_changed_repetition_drops_its_client() -> None:
    job = Federation.of(5)
    job.begin()
    job.settle()
    who, message = next((who, message) for who, message in job.heard if message.HasField("shares"))
    job.answer(who, message)
    assert not job.server.faults
    del message.shares.sealed[0]
    job.answer(who, message)
    assert [(fault.who, fault.reason) for fault in job.server.faults] == [(who, Reason.CHANGED)]


def test_nobody_stalls_a_phase() -> None:
    """Each phase ends at its deadline, with as many silent clients as the threshold allows."""
    job = Federation.of(9)
    silent = sorted(job.clients)[:2]
    for number, who in enumerate(silent):
        receive = job.clients[who].receive
        job.clients[who].receive = lambda message, receive=receive: receive(message)[:0]  # type: ignore[method-assign,misc]
        assert number < 9 - secure_sums.threshold(9)
    job.run()
    assert job.server.phase is Phase.DONE
    assert job.server.dropped.keys() == set(silent)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_arbitrary_messages_never_raise_and_never_stall(data: st.DataObject) -> None:
    """One hostile client sends anything at any time; the honest clients' sum is opened all the same."""
    job = Federation.of(6)
    liar = ("cloud", 1)
    job.begin()
    genuine: list[bytes] = [b""]
    while job.server.phase not in (Phase.DONE, Phase.FAILED):
        for _ in range(data.draw(st.integers(0, 2))):
            raw = data.draw(st.sampled_from(genuine).flatmap(lambda known: EDITS_OF_BYTES.map(
                lambda edits: edited(known, edits))) | arbitrary(Answer.DESCRIPTOR, [JOB, "cloud"]).map(
                lambda message: message.SerializeToString()))  # fmt: skip
            try:
                message = Answer.FromString(raw)
            except Exception:  # noqa: S112  (the transport refuses it)
                continue
            message.incarnation = data.draw(st.sampled_from([message.incarnation, 1]))
            job.send(job.server.receive(liar, message))
            job.send(job.server.receive(data.draw(st.sampled_from([("x", 0), liar])), message))
        if job.queue:
            out = job.queue.popleft()
            answers = job.clients[out.who].receive(out.message)
            if out.who == liar:
                genuine += [answer.SerializeToString() for answer in answers]
                if data.draw(st.booleans()):
                    continue
            for answer in answers:
                job.answer(out.who, answer)
        elif job.server.phase is Phase.COLLECT:
            ready = job.server.contributors_possible
            job.collect(ready if job.clients[liar].protocol.masks else ready - {liar})
            job.freeze()
        elif job.server.waiting_for:
            job.send(job.server.deadline())
    assert {fault.who for fault in job.server.faults} <= {liar, ("x", 0)}
    assert job.server.phase is Phase.DONE, job.server.failure
    assert equal(job.opened(), job.expected())
    assert all("\n" not in fault.message for fault in job.server.faults)
    restored = ServerProtocol.restore(job.server.journal())
    assert sorted(restored.plan()) == sorted(job.server.plan())


def test_an_instance_without_participants_fails() -> None:
    server = ServerProtocol(JOB, begin_of(1), [Participant("cloud", 0, 1, "i")])
    server.start()
    assert server.phase is Phase.ADVERTISE
    server.deadline()
    assert server.phase is Phase.FAILED
    empty = ServerProtocol(JOB, begin_of(1), [])
    assert empty.start() == [] and empty.phase is Phase.FAILED
