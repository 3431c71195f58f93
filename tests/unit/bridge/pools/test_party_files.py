"""Files of secure aggregation beside a pool's certificate, from its submission to its end."""

import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from isthmus_bridge.parties import party_files, signing_root
from isthmus_bridge.pools.pools import Denied
from isthmus_contracts.identities import CREDENTIAL_FILE, SIGNING_KEY_FILE, TRUST_FILE
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.wire.parties import Signer, Trust, new_root, verify
from tests.support.fake_slurm import KEY, PEM, World, policy

OTHER = new_root()[1]
SECURE = pb.Privacy(secure_aggregation=True)
RULES: dict[str, Any] = {
    "secure_aggregation": {"required": True, "min_parties": 2, "min_clients": 4, "roots": {"cloud": OTHER}},
    "tensors": ["adapter.*"],
    "max_bytes_per_round": 1000,
}


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Give the site a root, and return its public key."""
    public, fresh = signing_root.make(tmp_path)
    assert fresh
    (tmp_path / "tls").mkdir()
    signing_root.install(tmp_path, tmp_path / "tls")
    return public


def tls(world: World, key: str = KEY) -> Path:
    return world.policy.run_dir / key / "tls"


def with_rules(world: World, **rules: Any) -> None:
    world.current_policy.replace(policy(world.policy.run_dir.parent, privacy=rules))


def test_a_pool_gets_a_key_that_the_sites_root_has_signed(world: World, root: str) -> None:
    with_rules(world, **RULES)
    world.ensure(privacy=SECURE)
    signer = Signer.read(tls(world))
    verify(signer.credential, root)
    assert (signer.credential.party, signer.credential.job_uid, signer.credential.pool) == ("test", "5e2b-uid", "lumi")
    assert Trust.read(tls(world)) == Trust(
        roots={"cloud": OTHER, "test": root}, min_parties=2, min_clients=4, required=True, tensors=["adapter.*"],
        max_bytes_per_round=1000,
    )  # fmt: skip
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tls(world).iterdir()}
    assert modes == dict.fromkeys(
        ("ca.crt", "tls.crt", "tls.key", SIGNING_KEY_FILE, CREDENTIAL_FILE, TRUST_FILE), 0o600
    )


def test_a_repeated_request_and_a_renewal_keep_the_key_and_renew_the_trust(world: World, root: str) -> None:
    world.ensure()
    before = (tls(world) / SIGNING_KEY_FILE).read_bytes()
    assert Trust.read(tls(world)).min_parties == 1
    for number, repeat in enumerate((world.ensure, lambda: renew(world)), 2):
        with_rules(world, secure_aggregation={"min_parties": number})
        repeat()
        assert Trust.read(tls(world)).min_parties == number
        assert (tls(world) / SIGNING_KEY_FILE).read_bytes() == before
        Signer.read(tls(world))


def renew(world: World) -> None:
    request = pb.RenewCredentialsRequest(key=KEY, ca_certificate=PEM, certificate=PEM, private_key=PEM)
    world.pools.renew(world.identity, request)


def test_a_policy_that_became_stricter_reaches_a_pool_that_waits(world: World, root: str) -> None:
    world.slurm.script = ["full"]
    world.ensure(privacy=SECURE)
    assert Trust.read(tls(world)) == Trust(roots={"test": root}, required=True)
    with_rules(world, **RULES)
    world.tick(times=40)
    assert world.phase() == "PENDING"
    trust = Trust.read(tls(world))
    assert (trust.required, trust.min_parties, trust.min_clients) == (True, 2, 4)
    assert trust.tensors == ["adapter.*"]


ASKED = pb.Privacy(secure_aggregation=True, min_parties=3, min_clients=5)


@pytest.mark.parametrize(
    ("rules", "asked", "conditions"),
    [
        ({}, pb.Privacy(), (False, 1, 3)),
        ({}, SECURE, (True, 1, 3)),
        ({}, ASKED, (True, 3, 5)),
        ({"min_parties": 2, "min_clients": 9}, ASKED, (True, 3, 9)),
        ({"min_parties": 4, "min_clients": 4}, ASKED, (True, 4, 5)),
        ({"required": True, "min_parties": 2}, SECURE, (True, 2, 3)),
    ],
)
def test_clients_enforce_the_stricter_of_the_policy_and_the_job(
    world: World, root: str, rules: dict[str, Any], asked: pb.Privacy, conditions: tuple[bool, int, int]
) -> None:
    with_rules(world, secure_aggregation=rules)
    world.ensure(privacy=asked)
    assert enforced(world) == conditions


def enforced(world: World) -> tuple[bool, int, int]:
    trust = Trust.read(tls(world))
    return trust.required, trust.min_parties, trust.min_clients


@pytest.mark.parametrize("how", ["repeat", "renewal", "submission"])
def test_a_new_trust_file_keeps_what_the_job_demands(world: World, root: str, how: str) -> None:
    world.slurm.script = ["full"]
    world.ensure(privacy=ASKED)
    (tls(world) / TRUST_FILE).unlink()
    with_rules(world, secure_aggregation={"min_clients": 7}, tensors=["head.*"])
    if how == "repeat":
        world.ensure(privacy=ASKED)
    elif how == "renewal":
        renew(world)
    else:
        world.tick(times=40)
    assert enforced(world) == (True, 3, 7)
    assert Trust.read(tls(world)).tensors == ["head.*"]


def test_the_files_vanish_with_the_pools_certificate(world: World, root: str) -> None:
    world.ensure(privacy=SECURE)
    world.tick()
    world.cancel()
    world.tick(times=3)
    assert world.phase() == "CANCELLED"
    assert not tls(world).exists()


def test_each_pool_has_a_key_of_its_own(world: World, root: str) -> None:
    other = "f" * 32
    world.ensure(privacy=SECURE)
    world.ensure(other, privacy=SECURE, attempt=2)
    assert Signer.read(tls(world)).credential.public_key != Signer.read(tls(world, other)).credential.public_key


def test_without_a_root_secure_jobs_are_denied_and_others_get_no_key(world: World) -> None:
    with pytest.raises(Denied, match=r"^policy privacy\.secure_aggregation: this site has no root .*signing-root\.key"):
        world.ensure(privacy=SECURE)
    assert world.slurm.submissions == 0
    assert not (world.policy.run_dir / KEY).exists()
    world.ensure()
    assert not (tls(world) / TRUST_FILE).exists()


def test_without_a_root_the_trust_file_still_limits_what_leaves(world: World) -> None:
    with_rules(world, tensors=["head.*"])
    world.ensure()
    assert Trust.read(tls(world)) == Trust(roots={}, tensors=["head.*"])
    assert not (tls(world) / SIGNING_KEY_FILE).exists()


@pytest.mark.parametrize(
    ("party", "message"),
    [("test", r"roots\.test: is not this site's root"), ("twin", r"roots\.twin: is the root of this site, test")],
)
def test_a_root_that_contradicts_the_sites_own_is_denied(world: World, root: str, party: str, message: str) -> None:
    with_rules(world, secure_aggregation={"roots": {party: root if party == "twin" else OTHER}})
    with pytest.raises(Denied, match=message):
        world.ensure(privacy=SECURE)


def test_a_policy_that_lists_the_sites_own_root_is_in_order(world: World, root: str) -> None:
    with_rules(world, secure_aggregation={"roots": {"test": root, "cloud": OTHER}})
    world.ensure(privacy=SECURE)
    assert Trust.read(tls(world)).roots == {"test": root, "cloud": OTHER}


def test_certificates_are_renewed_even_if_the_root_is_damaged(
    world: World, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.ensure()
    (world.policy.tls_dir / signing_root.KEY_FILE).write_bytes(b"damaged")
    request = pb.RenewCredentialsRequest(key=KEY, ca_certificate=PEM, certificate=PEM + PEM, private_key=PEM)
    world.pools.renew(world.identity, request)
    assert (tls(world) / "tls.crt").read_bytes() == PEM + PEM
    assert "cannot renew the clients' trust file" in caplog.text


def test_a_lost_journal_and_a_repeated_request_remake_the_files(world: World, root: str) -> None:
    world.ensure(privacy=SECURE)
    assert world.journal is not None
    world.journal.delete(KEY)
    world.ensure(privacy=SECURE)
    verify(Signer.read(tls(world)).credential, root)
    world.tick(times=3)
    assert world.slurm.submissions == 1


def test_a_root_is_made_once(tmp_path: Path) -> None:
    public, _ = signing_root.make(tmp_path)
    key = tmp_path / signing_root.KEY_FILE
    before = key.read_bytes()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert signing_root.make(tmp_path) == (public, False)
    assert key.read_bytes() == before
    shutil.move(key, tmp_path / "away")
    with pytest.raises(ValueError, match=rf"signing-root\.key is missing: put it there .* {public} trust that one"):
        signing_root.make(tmp_path)
    assert not key.exists()


@pytest.mark.parametrize(
    ("rules", "noise"),
    [
        ({"required": True, "distributed": True, "min_noise_multiplier": 4.0}, 4.0),
        ({"required": True, "distributed": True}, 0.0),
        ({"required": True, "min_noise_multiplier": 4.0}, None),  # the aggregator may add it
    ],
)
def test_clients_check_the_noise_that_the_site_demands_of_them(
    world: World, root: str, rules: dict[str, Any], noise: float | None
) -> None:
    with_rules(world, differential_privacy=rules)
    assert party_files.trust(world.current_policy.policy, root, pb.Privacy()).noise_multiplier == noise


@pytest.mark.parametrize(
    ("asked", "rules", "demanded"),
    [
        ({}, {}, None),
        ({"noise_multiplier": 2.0}, {}, None),  # the aggregator adds it
        ({"noise_multiplier": 2.0, "distributed_noise": True}, {}, 2.0),
        (
            {"noise_multiplier": 2.0, "distributed_noise": True},
            {"required": True, "distributed": True, "min_noise_multiplier": 3.0},
            3.0,
        ),
        (
            {"noise_multiplier": 4.0, "distributed_noise": True},
            {"required": True, "distributed": True, "min_noise_multiplier": 3.0},
            4.0,
        ),
    ],
)
def test_clients_demand_the_larger_noise_of_policy_and_job(
    asked: dict[str, Any], rules: dict[str, Any], demanded: float | None, tmp_path: Path
) -> None:
    settings = policy(tmp_path, privacy={"differential_privacy": rules})
    trust = party_files.trust(settings, OTHER, pb.Privacy(secure_aggregation=True, **asked))
    assert trust.noise_multiplier == demanded
