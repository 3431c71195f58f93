"""Roots, credentials and trust files of secure aggregation."""

import dataclasses
import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from isthmus_contracts.wire import parties
from isthmus_contracts.wire.parties import Credential, PartyError, Signer, Trust

JOB = "0b7c1c1e-90f1-4d8f-a0b5-0d2c3a4f5e6d"


@pytest.fixture(scope="module")
def root() -> tuple[bytes, str]:
    return parties.new_root()


@pytest.fixture(scope="module")
def issued(root: tuple[bytes, str]) -> tuple[bytes, Credential]:
    return parties.issue(root[0], "hpc-a", JOB, "slurm")


def test_a_credential_verifies_under_its_root_only(root: tuple[bytes, str], issued: tuple[bytes, Credential]) -> None:
    parties.verify(issued[1], root[1])
    with pytest.raises(PartyError, match="signature is wrong"):
        parties.verify(issued[1], parties.new_root()[1])


@pytest.mark.parametrize(
    "change", [{"party": "hpc-b"}, {"job_uid": "another"}, {"pool": "cloud"}, {"public_key": bytes(31) + b"\7"}]
)
def test_every_field_is_signed(
    change: dict[str, str], root: tuple[bytes, str], issued: tuple[bytes, Credential]
) -> None:
    with pytest.raises(PartyError, match="signature is wrong"):
        parties.verify(dataclasses.replace(issued[1], **change), root[1])


def test_the_boundary_between_fields_is_signed(root: tuple[bytes, str]) -> None:
    _, credential = parties.issue(root[0], "ab", "c", "pool")
    with pytest.raises(PartyError):
        parties.verify(dataclasses.replace(credential, party="a", job_uid="bc"), root[1])
    assert parties.canonical("d", "ab", "c") != parties.canonical("d", "a", "bc")
    assert parties.canonical("d", "a", b"") != parties.canonical("d", "a")


def test_a_credential_survives_its_file(issued: tuple[bytes, Credential]) -> None:
    assert Credential.parse(issued[1].serialized()) == issued[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": "1"}, "unknown field 'extra'"),
        ({"pool": None}, "pool is missing or not a text"),
        ({"party": "../etc"}, "party '../etc' is not a name"),
        ({"pool": "a\n"}, "is not a name"),
        ({"public_key": "AB" * 32}, "public_key: not hexadecimal digits"),
        ({"public_key": "ab"}, "has 1 bytes, not 32"),
        ({"public_key": "00" * 32}, "anybody could sign"),
        ({"signature": "ab"}, "signature has 1 bytes, not 64"),
    ],
)
def test_a_malformed_credential_is_refused_in_one_line(
    change: dict[str, object], message: str, issued: tuple[bytes, Credential]
) -> None:
    values = json.loads(issued[1].serialized()) | change
    with pytest.raises(PartyError, match=message) as caught:
        Credential.parse(json.dumps(values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"party": "a", "party": "b"}'])
def test_text_that_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(PartyError):
        Credential.parse(text)
    with pytest.raises(PartyError):
        Trust.parse(text)


def test_a_signer_signs_with_the_key_of_its_credential(issued: tuple[bytes, Credential]) -> None:
    signer = Signer(*issued)
    text = parties.canonical("test", 1)
    signature = signer.sign(text)
    parties.verify_signature(signer.credential.public_key, text, signature)
    with pytest.raises(PartyError, match="entry: the signature is wrong"):
        parties.verify_signature(signer.credential.public_key, parties.canonical("test", 2), signature, "entry")


def test_a_signer_refuses_a_credential_of_another_key(
    root: tuple[bytes, str], issued: tuple[bytes, Credential]
) -> None:
    with pytest.raises(PartyError, match="do not belong together"):
        Signer(issued[0], parties.issue(root[0], "hpc-a", JOB, "slurm")[1])


def test_keys_of_other_kinds_are_refused(issued: tuple[bytes, Credential]) -> None:
    other = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(PartyError, match="not an Ed25519 key"):
        parties.public_root(other)
    with pytest.raises(PartyError, match="not a private key in PEM"):
        Signer(b"no key", issued[1])


def test_a_root_shows_its_public_key(root: tuple[bytes, str]) -> None:
    assert parties.public_root(root[0]) == root[1]


def test_files_are_read_back_and_private(
    tmp_path: Path, root: tuple[bytes, str], issued: tuple[bytes, Credential]
) -> None:
    trust = Trust(roots={"hpc-a": root[1]}, min_parties=2, required=True, max_bytes_per_round=10)
    parties.write_party_files(tmp_path, *issued, trust)
    assert Signer.read(tmp_path).credential == issued[1]
    assert Trust.read(tmp_path) == trust
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_trust_accepts_trusted_parties_in_this_job_only(
    root: tuple[bytes, str], issued: tuple[bytes, Credential]
) -> None:
    trust = Trust(roots={"hpc-a": root[1]})
    trust.verify(issued[1], JOB)
    with pytest.raises(PartyError, match=r"is for job .*, not other"):
        trust.verify(issued[1], "other")
    with pytest.raises(PartyError, match=r"'hpc-a' has no root in trust\.json"):
        Trust(roots={"cloud": root[1]}).verify(issued[1], JOB)
    with pytest.raises(PartyError, match="signature is wrong"):
        Trust(roots={"hpc-a": parties.new_root()[1]}).verify(issued[1], JOB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_client": 4}, r"trust\.min_client: Extra inputs"),
        ({"roots": {"a": "ab"}}, r"trust\.roots\.a: 'ab' is not a public key: 64 hexadecimal digits"),
        ({"roots": {"a": "AB" * 32}}, "64 hexadecimal digits in lower case"),
        ({"roots": {"a": "00" * 32}}, "anybody could sign"),
        ({"roots": {"a": "ec" + "ff" * 31}}, "anybody could sign"),
        ({"roots": {"a": "12" * 32, "b": "12" * 32}}, "a and b have the same root"),
        ({"roots": {"a/b": "12" * 32}}, r"trust\.roots\.a/b"),
        ({"min_clients": 2}, r"trust\.min_clients"),
        ({"min_parties": 0}, r"trust\.min_parties"),
        ({"min_parties": "2"}, r"trust\.min_parties"),
        ({"required": 1}, r"trust\.required"),
        ({"max_bytes_per_round": 0}, r"trust\.max_bytes_per_round"),
    ],
)
def test_a_bad_trust_file_is_refused_and_names_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(PartyError, match=message) as caught:
        Trust.parse(json.dumps({"roots": {}} | change))
    assert "\n" not in str(caught.value)
