"""Lines of a local run about secure aggregation, and the keys that it makes."""

from pathlib import Path
from typing import Any

import pytest

from isthmus.local.certificates import client_directory, issue_certificates
from isthmus.local.protection import InstanceFailures, introduction, result
from isthmus_contracts.manifests.manifest import FederatedJob, parse_spec
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.wire.parties import PartyError, Signer, Trust

UID = "6f1c0c1e-0000-4000-8000-000000000001"
CLOUD: dict[str, Any] = {"name": "cloud", "replicas": 3, "cloud": {}}
SITE: dict[str, Any] = {"name": "hpc", "replicas": 2, "hpc": {"siteRef": {"name": "cloud"}, "environment": "py"}}


def job(*pools: dict[str, Any], secure: dict[str, Any] | None, private: dict[str, Any] | None = None) -> FederatedJob:
    spec: dict[str, Any] = {"rounds": 2, "task": {"image": "i", "command": ["true"]}, "pools": pools}
    privacy = {"secureAggregation": secure, "differentialPrivacy": private}
    return FederatedJob("demo", "default", parse_spec(spec | {"privacy": privacy}))


def status(**secure: Any) -> pb.FederationStatus:
    return pb.FederationStatus(secure=pb.SecureStatus(**secure))


def test_one_party_protects_from_a_curious_aggregator_only() -> None:
    lines = introduction(job(CLOUD, secure={}).spec)
    assert "of 3 clients in a round at least 3 must hand in; only their sum is opened" in lines[0]
    assert "one party, the cluster" in lines[1]
    assert "from a curious aggregator only" in lines[2]
    assert "this run makes all keys on this machine" in lines[3]


def test_several_parties_are_named() -> None:
    lines = introduction(job(CLOUD, SITE, secure={}).spec)
    assert "of 5 clients in a round at least 5 must hand in" in lines[0]
    assert lines[1] == "secure aggregation: parties: the cluster (3), site cloud (2)"


def test_a_run_without_it_says_nothing() -> None:
    assert introduction(job(CLOUD, secure=None).spec) == []
    assert result(pb.FederationStatus()) == ""
    assert InstanceFailures().news(pb.FederationStatus()) == ""


def test_each_failure_is_told_once_also_after_a_restart() -> None:
    failures = InstanceFailures()
    assert failures.news(status(round=2)) == ""
    lost = status(round=2, failed=1, message="2 survivors are fewer\nthan 3")
    assert failures.news(lost) == "secure aggregation is done again in round 2: 2 survivors are fewer than 3"
    assert failures.news(lost) == ""
    assert failures.news(status(round=3)) == ""
    assert failures.news(lost) != ""


def test_the_result_counts_updates_and_dropouts() -> None:
    assert result(status(survivors=7, dropouts=1)) == "secure aggregation: 7 updates in the newest sum, 1 dropout"
    assert result(status(survivors=7, clipped_ratio=0.0123, failed=2)) == (
        "secure aggregation: 7 updates in the newest sum, 0 dropouts, 1.23% of the coordinates clipped,"
        " 2 instances failed"
    )


def test_clients_get_keys_of_their_party(tmp_path: Path) -> None:
    issue_certificates(job(CLOUD, SITE, secure={"minParties": 2, "minClients": 4}), UID, tmp_path)
    first, second = (client_directory(tmp_path, "cloud", 0), client_directory(tmp_path, "hpc", 1))
    trust, mine, other = Trust.read(first), Signer.read(first).credential, Signer.read(second).credential
    assert (trust.min_parties, trust.min_clients, trust.required) == (2, 4, True)
    assert trust == Trust.read(second)
    # A site that has the name of the cloud's party is another party.
    assert len({mine.party, other.party}) == len(set(trust.roots.values())) == 2
    for credential in (mine, other):
        trust.verify(credential, UID)
    with pytest.raises(PartyError, match="for job"):
        trust.verify(mine, "another-job")
    assert not list((tmp_path / ".aggregator").glob("signing*"))


def test_every_client_refuses_clear_rounds_also_with_the_defaults(tmp_path: Path) -> None:
    issue_certificates(job(CLOUD, SITE, secure={}), UID, tmp_path)
    for pool, size in (("cloud", 3), ("hpc", 2)):
        for index in range(size):
            trust = Trust.read(client_directory(tmp_path, pool, index))
            assert (trust.required, trust.min_parties, trust.min_clients) == (True, 1, 3)


def test_clients_demand_the_noise_that_they_are_to_add(tmp_path: Path) -> None:
    noise = {"clipNorm": "1", "noiseMultiplier": "2.5", "delta": "1e-3", "noise": "Distributed"}
    for wanted, value in ((noise, 2.5), (noise | {"noise": "Aggregator"}, None)):
        manifest = job(CLOUD, SITE, secure={}, private=wanted)
        issue_certificates(manifest, UID, tmp_path)
        assert Trust.read(client_directory(tmp_path, "cloud", 0)).noise_multiplier == value


def test_a_job_without_it_gets_no_signing_keys(tmp_path: Path) -> None:
    issue_certificates(job(CLOUD, secure=None), UID, tmp_path)
    assert sorted(path.name for path in client_directory(tmp_path, "cloud", 0).iterdir()) == [
        "ca.crt", "tls.crt", "tls.key",
    ]  # fmt: skip
