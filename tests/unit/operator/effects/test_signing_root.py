"""The cluster's root of secure aggregation, and the keys and trust files that it gives to cloud clients."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest

from isthmus_contracts import identities as ids
from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_contracts.wire.parties import Credential, Signer, Trust, new_root, verify
from isthmus_operator.effects import certificates, dependents
from isthmus_operator.effects.kube import Kube, KubeError
from isthmus_operator.effects.signing_root import KEY, SigningRoot, SigningRootError
from isthmus_operator.planning import desired
from isthmus_operator.planning.actions import IssueCertificate
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.render import references
from isthmus_operator.render.trust import trust_of
from isthmus_operator.state.job_store import SiteStore
from isthmus_operator.state.parties import ClusterParty, SiteParty
from tests.support.fake_cluster import NOW, UID, job, spec

SECURE = spec(cloud=4, hpc=3, privacy={"secureAggregation": {"minParties": 2, "minClients": 4}})
SITE_ROOT = new_root()[1]
SITE_BODY = {
    "metadata": {"name": "site", "resourceVersion": "1"},
    "spec": {
        "endpoint": "bridge.example:7444",
        "tls": {"secretRef": {"name": "bridge", "namespace": "isthmus"}},
        "allowedNamespaces": ["*"],
    },
}


class FakeKube:
    """A fake API server with Secrets."""

    def __init__(self, *, created_by_another: Mapping[str, Any] | None = None, refusal: int = 0) -> None:
        self.secrets: dict[tuple[str, str], Mapping[str, Any]] = {}
        self.created = 0
        self._other = created_by_another
        self._refusal = refusal

    async def get(self, kind: str, namespace: str, name: str) -> Mapping[str, Any] | None:
        if self._refusal:
            raise KubeError(self._refusal, "secrets is forbidden")
        return self.secrets.get((namespace, name)) if kind == "Secret" else None

    async def create(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        place = body["metadata"]["namespace"], body["metadata"]["name"]
        if self._other is not None:
            self.secrets[place] = self._other
            raise KubeError(409, "already exists")
        self.secrets[place] = body
        self.created += 1
        return body


def root(kube: FakeKube, namespace: str = "isthmus-system") -> SigningRoot:
    return SigningRoot(cast(Kube, kube), "cluster", namespace)


async def test_it_is_made_once_and_read_by_the_next_operator() -> None:
    kube = FakeKube()
    first = root(kube)
    found = await asyncio.gather(first.load(), first.load())
    assert found[0] == found[1] == await root(kube).load()
    assert kube.created == 1
    ((place, secret),) = kube.secrets.items()
    assert place == ("isthmus-system", "isthmus-signing-root")
    assert secret["immutable"] is True
    assert "PRIVATE" not in repr(found[0])


async def test_of_two_operators_the_quicker_one_wins() -> None:
    other = FakeKube()
    quicker = await root(other).load()
    (theirs,) = other.secrets.values()
    assert await root(FakeKube(created_by_another=theirs)).load() == quicker


async def test_no_template_may_mount_it() -> None:
    kube = FakeKube()
    await root(kube).load()
    (secret,) = kube.secrets.values()
    assert "Isthmus' own" in references.forbidden_reason("Secret", "isthmus-signing-root", secret, "demo", UID)


@pytest.mark.parametrize(
    ("kube", "namespace", "words"),
    [
        (FakeKube(), "", "start it with --signing-root NAMESPACE/NAME"),
        (FakeKube(refusal=403), "isthmus-system", "cannot use its Secret isthmus-system/isthmus-signing-root"),
        (
            FakeKube(created_by_another={"data": {KEY: "bm90IGEga2V5"}}),
            "isthmus-system",
            "not a private key in PEM without a password; restore it from a backup",
        ),
        (FakeKube(created_by_another={"data": {}}), "isthmus-system", "restore it from a backup"),
    ],
)
async def test_an_unusable_root_is_explained(kube: FakeKube, namespace: str, words: str) -> None:
    with pytest.raises(SigningRootError) as error:
        await root(kube, namespace).load()
    assert words in str(error.value)
    assert str(error.value).startswith("secure aggregation: ")


async def test_an_api_server_that_does_not_answer_is_no_verdict() -> None:
    with pytest.raises(KubeError):
        await root(FakeKube(refusal=503)).load()


def signed(party: ClusterParty, **changes: Any) -> tuple[dict[str, Any], IssueCertificate, certificates.Authority]:
    authority = certificates.load_authority(certificates.authority_secret(job(), "demo-ca", 730, NOW))
    assert authority is not None
    trust = trust_of(parse_spec(SECURE), party.name, party.root, {"site": SiteParty("lumi", SITE_ROOT)})
    issued = desired.certificates(job(), parse_spec(SECURE), trust.serialized().decode())
    (wanted,) = (item for item in issued if item.clients)
    wanted = replace(wanted, **changes)
    return certificates.leaf_secret(job(), authority, wanted, NOW, party), wanted, authority


async def test_cloud_clients_get_a_key_of_the_clusters_party_and_all_roots() -> None:
    party = await root(FakeKube()).load()
    secret, wanted, authority = signed(party)
    data = certificates.decoded(secret)
    credential, trust = Credential.parse(data[ids.CREDENTIAL_FILE]), Trust.parse(data[ids.TRUST_FILE])
    Signer(data[ids.SIGNING_KEY_FILE], credential)
    verify(credential, party.root)
    assert (credential.party, credential.job_uid, credential.pool) == ("cluster", UID, "cloud")
    assert trust.roots == {"cluster": party.root, "lumi": SITE_ROOT}
    assert (trust.required, trust.min_parties, trust.min_clients) == (True, 2, 4)
    assert certificates.is_current(secret, wanted, authority, NOW, party)


async def test_only_cloud_clients_get_keys() -> None:
    party = await root(FakeKube()).load()
    trust = trust_of(parse_spec(SECURE), party.name, party.root, {"site": SiteParty("lumi", SITE_ROOT)})
    issued = desired.certificates(job(), parse_spec(SECURE), trust.serialized().decode())
    assert [item.secret for item in issued if item.signing is not None] == ["demo-cloud-tls"]
    assert len(issued) == 4  # also the aggregator's, the observer's and the HPC pool's


async def test_keys_of_another_root_job_or_trust_are_made_again() -> None:
    party, other = await root(FakeKube()).load(), await root(FakeKube()).load()
    secret, wanted, authority = signed(party)
    assert wanted.signing is not None
    assert not certificates.is_current(secret, wanted, authority, NOW, other)
    for changes in ({"trust": wanted.signing.trust.replace(SITE_ROOT, new_root()[1])}, {"job_uid": "another"}):
        changed = replace(wanted, signing=replace(wanted.signing, **changes))
        assert not certificates.is_current(secret, changed, authority, NOW, party)
    assert not certificates.is_current(secret, replace(wanted, signing=None), authority, NOW, party)
    # While the root or the trust is not known, what is there stays.
    unknown = replace(wanted, signing=replace(wanted.signing, trust=""))
    assert certificates.is_current(secret, unknown, authority, NOW, None)


class Empty(FakeKube):
    """A fake API server without any of the job's objects."""


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({}, "spec.pools[1].hpc.siteRef.name: HPCSite 'site' has no signing root"),
        ({"signing": {"party": "lumi", "root": SITE_ROOT}}, ""),
    ],
)
async def test_a_job_waits_for_the_roots_of_its_sites(status: dict[str, Any], words: str) -> None:
    sites = SiteStore()
    sites.put({**SITE_BODY, "status": status})
    kube = Empty()
    found = await dependents.load(cast(Kube, kube), job(SECURE), NOW, PlanOptions(), sites, root(kube), resting=False)
    assert found.trust_problem.startswith(words) and bool(found.trust_problem) is bool(words)
    assert bool(found.trust) is not bool(words)


async def test_a_job_without_cloud_pools_needs_no_root_of_the_cluster() -> None:
    kube = Empty()
    wanted = job(spec(cloud=0, hpc=3, privacy={"secureAggregation": {}}))
    await dependents.load(cast(Kube, kube), wanted, NOW, PlanOptions(), SiteStore(), root(kube), resting=False)
    assert kube.created == 0
