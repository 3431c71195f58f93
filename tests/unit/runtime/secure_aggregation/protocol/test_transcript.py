"""Texts that are signed and hashed cover every field, and no text serves two purposes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from isthmus.secure_aggregation import transcript
from isthmus.secure_aggregation.transcript import Terms
from isthmus_contracts.pb import federation_pb2
from isthmus_contracts.pb import secure_aggregation_pb2 as pb

from .secure_federation import JOB, begin_of

ENTRY = pb.SecureEntry(
    pool="cloud", index=3, attempt=1, instance="i", mask_key=b"m", share_key=b"s", nonce_commitment=b"n",
    seed_commitment=b"c", signature=b"g",
    credential=pb.SecureCredential(party="p", job_uid="j", pool="cloud", public_key=b"k", signature=b"r"),
)  # fmt: skip
BEGIN = begin_of(7, 3)
BEGIN.layout.noise.clip_norm = 1
TERMS = Terms.of(JOB, BEGIN)


def variants(message: Message, path: str = "") -> Iterator[tuple[str, Message]]:
    """Yield copies of a message that differ in one field each, with the field's path."""
    for field in message.DESCRIPTOR.fields:
        name = f"{path}{field.name}"
        if field.message_type is not None and not field.is_repeated:
            for inner, part in variants(getattr(message, field.name), f"{name}."):
                copy = type(message)()
                copy.CopyFrom(message)
                getattr(copy, field.name).CopyFrom(part)
                yield inner, copy
            continue
        copy = type(message)()
        copy.CopyFrom(message)
        if field.is_repeated and field.message_type is not None:
            for inner, part in variants(field.message_type._concrete_class(), f"{name}[]."):
                extended = type(message)()
                extended.CopyFrom(message)
                getattr(extended, field.name).append(part)
                yield inner, extended
            getattr(copy, field.name).add()
        elif field.is_repeated:
            getattr(copy, field.name).append(_other(field, None))
        else:
            setattr(copy, field.name, _other(field, getattr(message, field.name)))
        yield name, copy


def _other(field: FieldDescriptor, value: Any) -> Any:
    if field.type == FieldDescriptor.TYPE_BOOL:
        return not value
    if field.type == FieldDescriptor.TYPE_STRING:
        return f"{value}x"
    if field.type == FieldDescriptor.TYPE_BYTES:
        return (value or b"") + b"x"
    return 2 if value == 1 else 1


def test_a_layout_digest_covers_every_field() -> None:
    """Fields that are added later, too: the encoding follows the message's description."""
    digests = {"": transcript.layout_digest(BEGIN.layout)}
    for name, layout in variants(BEGIN.layout):
        digests[name] = transcript.layout_digest(layout)
    assert len(set(digests.values())) == len(digests) > 20


def test_the_terms_cover_every_field_that_clients_must_see_alike() -> None:
    texts = {"": TERMS.text, "job": Terms.of("another", BEGIN).text}
    for name, begin in variants(BEGIN):
        if name != "phase_seconds":
            texts[name] = Terms.of(JOB, begin).text
    assert len(set(texts.values())) == len(texts)


def test_a_signature_covers_every_field_of_an_entry() -> None:
    texts = {"": transcript.entry_text(TERMS, ENTRY)}
    digests = {"": transcript.entries_digest(TERMS, [ENTRY])}
    for name, entry in variants(ENTRY):
        digests[name] = transcript.entries_digest(TERMS, [entry])
        if name != "signature":
            texts[name] = transcript.entry_text(TERMS, entry)
    assert len(set(texts.values())) == len(texts) == 14
    assert len(set(digests.values())) == len(digests) == 15


def _hashes() -> dict[str, Callable[[Terms], bytes]]:
    return {
        "nonce": lambda terms: transcript.nonce_commitment(terms, "a", 1, b"x"),
        "other nonce": lambda terms: transcript.nonce_commitment(terms, "a", 1, b"y"),
        "pool": lambda terms: transcript.nonce_commitment(terms, "b", 1, b"x"),
        "index": lambda terms: transcript.nonce_commitment(terms, "a", 2, b"x"),
        "seed": lambda terms: transcript.seed_commitment(terms, "a", 1, b"x"),
        "graph": lambda terms: transcript.graph_seed(terms, b"r", [b"x"]),
        "graph of two": lambda terms: transcript.graph_seed(terms, b"r", [b"x", b""]),
        "roster": lambda terms: transcript.roster_digest(terms, b"e", [1, 2], b""),
        "roster's members": lambda terms: transcript.roster_digest(terms, b"e", [1, 2, 3], b""),
        "roster's seed": lambda terms: transcript.roster_digest(terms, b"e", [1, 2], b"s"),
        "consent": lambda terms: transcript.consent_text(terms, b"r", [1, 2, 3], [1, 2], 1),
        "consent to others": lambda terms: transcript.consent_text(terms, b"r", [1, 2, 3], [1, 3], 1),
        "other senders": lambda terms: transcript.consent_text(terms, b"r", [1, 2], [1, 2], 1),
        "shifted": lambda terms: transcript.consent_text(terms, b"r", [1, 2], [3, 1, 2], 1),
        "other signer": lambda terms: transcript.consent_text(terms, b"r", [1, 2, 3], [1, 2], 2),
        "other roster": lambda terms: transcript.consent_text(terms, b"q", [1, 2, 3], [1, 2], 1),
        "no entries": lambda terms: transcript.entries_digest(terms, []),
    }


def test_no_text_serves_two_purposes_or_instances() -> None:
    seen = [make(terms) for make in _hashes().values() for terms in (TERMS, Terms.of(JOB, begin_of(8, 3)))]
    assert len(set(seen)) == len(seen)


def test_sets_are_encoded_in_one_way() -> None:
    assert transcript.packed([3, 1, 2]) == transcript.packed({1, 2, 3}) == bytes([0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3])
    nonces = [b"b" * 32, b"a" * 32]
    assert transcript.graph_seed(TERMS, b"r", nonces) == transcript.graph_seed(TERMS, b"r", nonces[::-1])


def test_the_encoding_does_not_depend_on_the_wire_form() -> None:
    wire = BEGIN.SerializeToString()
    # The fields in another order, and two fields twice: the last values count.
    other = pb.SecureBegin.FromString(pb.SecureBegin(attempt=9, round=1).SerializeToString() + wire)
    other.attempt = 0
    assert transcript.encode(other) == transcript.encode(BEGIN)


def test_maps_are_not_encoded() -> None:
    with pytest.raises(TypeError, match="a map has no order"):
        transcript.encode(federation_pb2.Offer(config={"a": "b"}))
