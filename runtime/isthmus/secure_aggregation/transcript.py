"""Texts that clients sign and hash: equal texts have equal meaning, and no text serves two purposes.

Every text begins with its own domain; every field follows its length (``parties.canonical``).
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.wire.parties import canonical

from .primitives.keys import Scope

_DOMAIN = "isthmus.dev/secure-aggregation/v1/"


@dataclass(frozen=True)
class Terms:
    """Everything that all clients of an instance must see alike before they take part."""

    job_uid: str
    round: int
    incarnation: int
    purpose: int
    attempt: int
    base_digest: str
    layout_digest: bytes

    @classmethod
    def of(cls, job_uid: str, begin: pb.SecureBegin) -> "Terms":
        return cls(
            job_uid, begin.round, begin.incarnation, begin.purpose, begin.attempt, begin.base_digest,
            layout_digest(begin.layout),
        )  # fmt: skip

    @property
    def scope(self) -> Scope:
        return Scope(self.job_uid, self.round, self.incarnation)

    @cached_property
    def text(self) -> bytes:
        return canonical(
            _DOMAIN + "terms", self.job_uid, self.round, self.incarnation, self.purpose, self.attempt,
            self.base_digest, self.layout_digest,
        )  # fmt: skip


def layout_digest(layout: pb.SecureLayout) -> bytes:
    """Return a digest of all fields of a layout, 32 bytes."""
    return _hash(canonical(_DOMAIN + "layout", encode(layout)))


def nonce_commitment(terms: Terms, pool: str, index: int, nonce: bytes) -> bytes:
    """Return the commitment of one client to its nonce: it cannot be copied by another client."""
    return _hash(canonical(_DOMAIN + "nonce", terms.text, pool, index, nonce))


def seed_commitment(terms: Terms, pool: str, index: int, seed: bytes) -> bytes:
    """Return the commitment of one client to the seed of its self mask."""
    return _hash(canonical(_DOMAIN + "seed", terms.text, pool, index, seed))


def entry_text(terms: Terms, entry: pb.SecureEntry) -> bytes:
    """Return the text that the client of an entry signs: all but the signature."""
    return canonical(_DOMAIN + "entry", terms.text, *_fields(entry))


def graph_seed(terms: Terms, roster_text_digest: bytes, nonces: Iterable[bytes]) -> bytes:
    """Return the seed of the graph: the entries and the commitments to all nonces are fixed before it is known."""
    return _hash(canonical(_DOMAIN + "graph", terms.text, roster_text_digest, *sorted(nonces)))


def entries_digest(terms: Terms, entries: Sequence[pb.SecureEntry]) -> bytes:
    """Return the digest of a roster as it was sent, with the clients that drop out later."""
    digest = hashlib.sha256(canonical(_DOMAIN + "entries", terms.text, len(entries)))
    for entry in entries:
        digest.update(canonical("", *_fields(entry), entry.signature))
    return digest.digest()


def roster_digest(terms: Terms, entries: bytes, members: Iterable[int], seed: bytes) -> bytes:
    """Return the digest of what fixes an instance: its entries (their digest), the members of the graph, its seed."""
    return _hash(canonical(_DOMAIN + "roster", terms.text, entries, packed(members), seed))


def consent_text(
    terms: Terms, roster: bytes, senders: Iterable[int], survivors: Iterable[int], signer: int
) -> bytes:  # fmt: skip
    """Return the text that a client signs to have the sum of the survivors opened.

    ``roster``: its digest. ``signer``: the client's entry, since all clients of a pool sign with one key.
    """
    return canonical(_DOMAIN + "survivors", terms.text, roster, packed(senders), packed(survivors), signer)


def packed(entries: Iterable[int]) -> bytes:
    """Return a set of entries as bytes, in ascending order."""
    return b"".join(entry.to_bytes(4, "big") for entry in sorted(entries))


def encode(message: Message) -> bytes:
    """Return the values of all fields of a message. Other than its wire form, it depends on the values alone.

    Each field is its number, the number of its values, and each value after its length. Raises ``TypeError`` for maps.
    """
    parts = []
    # The types of the two implementations of protobuf differ, their attributes do not.
    fields = cast(Sequence[FieldDescriptor], message.DESCRIPTOR.fields)
    for field in sorted(fields, key=lambda each: each.number):
        value = getattr(message, field.name)
        if field.is_repeated:
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                raise TypeError(f"{field.full_name}: a map has no order")
            values = [_raw(field, each) for each in value]
        else:
            values = [_raw(field, value)] if not field.has_presence or message.HasField(field.name) else []
        parts.append(struct.pack(">IQ", field.number, len(values)))
        parts += [struct.pack(">Q", len(raw)) + raw for raw in values]
    return b"".join(parts)


def _raw(field: FieldDescriptor, value: Any) -> bytes:
    if isinstance(value, Message):
        return encode(value)
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        return value
    if isinstance(value, float):
        return struct.pack(">d", value)
    return int(value).to_bytes(8, "big", signed=field.cpp_type in _SIGNED)


_SIGNED = {FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_ENUM}


def _fields(entry: pb.SecureEntry) -> tuple[bytes | str | int, ...]:
    """Return all fields of an entry but its signature. (:func:`encode` takes too long for a thousand entries.)"""
    credential = entry.credential
    return (
        entry.pool, entry.index, entry.attempt, entry.instance, entry.mask_key, entry.share_key,
        entry.nonce_commitment, entry.seed_commitment,
        credential.party, credential.job_uid, credential.pool, credential.public_key, credential.signature,
    )  # fmt: skip


def _hash(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()
