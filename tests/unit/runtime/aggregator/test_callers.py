"""Identification of callers by their certificates."""

import pytest

from isthmus.aggregator.rpc.callers import Caller, Callers
from isthmus_contracts.identities import client_identity, observer_identity, pool_identity
from isthmus_contracts.manifests.manifest import parse_spec

SPEC = parse_spec(
    {
        "rounds": 1,
        "task": {"image": "x", "command": ["python"]},
        "pools": [
            {"name": "cloud", "replicas": 2, "cloud": {}},
            {"name": "hpc", "replicas": 3, "hpc": {"siteRef": {"name": "s"}, "environment": "e"}},
        ],
    }
)
CALLERS = Callers(SPEC, "uid")
CLOUD = pool_identity("uid", "cloud")


def test_a_clients_certificate_speaks_for_that_client_only() -> None:
    caller = CALLERS.find([client_identity("uid", "cloud", 1)])
    assert caller == Caller("cloud", 1, 1)
    assert caller is not None and caller.speaks_for(("cloud", 1))
    for other in (("cloud", 0), ("cloud", 11), ("hpc", 1)):
        assert not caller.speaks_for(other)
    # Clients of an HPC pool may have certificates of their own too, as in a local run.
    assert CALLERS.find(["spiffe://else/where", client_identity("uid", "hpc", 12)]) == Caller("hpc", 12, 1)


def test_an_hpc_pools_certificate_speaks_for_its_clients() -> None:
    caller = CALLERS.find([pool_identity("uid", "hpc")])
    assert caller == Caller("hpc", None, 3)
    assert caller is not None and caller.speaks_for(("hpc", 2)) and not caller.speaks_for(("cloud", 2))


@pytest.mark.parametrize(
    "uri",
    [
        CLOUD,
        pool_identity("other", "hpc"),
        client_identity("other", "cloud", 0),
        client_identity("uid", "moon", 0),
        observer_identity("uid"),
        *(f"{CLOUD}/client/{index}" for index in ("", "-1", "01", "1x", "\u0661", "9" * 10, "1/2")),
    ],
)
def test_certificates_of_other_jobs_are_unknown(uri: str) -> None:
    assert CALLERS.find([uri]) is None
