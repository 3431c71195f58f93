"""Privacy at a site with a real Slurm: signing keys reach the tasks, and what they report reaches the audit log."""

import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus_bridge.parties import signing_root
from isthmus_contracts.identities import CREDENTIAL_FILE, SIGNING_KEY_FILE, TRUST_FILE
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.wire.departures import Departure
from isthmus_contracts.wire.parties import Credential, Trust, new_root, verify

from .slurm_site import Site, ensure, over, running, spec, until

SECURE = pb.Privacy(secure_aggregation=True, min_parties=2)
CLOUD = new_root()[1]
# Copies what a client would read, and reports one message. The loop keeps the pool alive until the test ends it.
TASK = """
cd "$ISTHMUS_TLS_DIR" && stat -c '%a %n' {files} && cat {public} >"$OLDPWD/seen" && cd "$OLDPWD"
printf '%s\\n' '{line}' >>"$ISTHMUS_AUDIT_DIR/audit.jsonl"
while [ ! -e done ]; do sleep 0.2; done
"""


def task(**fields: Any) -> list[str]:
    line = Departure(time=1.0, job=spec().job_uid, pool="hpc", index=0, round=1, **fields).line().decode().strip()
    files = f"{SIGNING_KEY_FILE} {CREDENTIAL_FILE} {TRUST_FILE}"
    return ["sh", "-ec", TASK.format(files=files, public=CREDENTIAL_FILE, line=line)]


@pytest.fixture
def root(site: Site) -> str:
    """Give the site a root, demand secure aggregation, and return the root's public key."""
    public, _ = signing_root.make(site.folder)
    signing_root.install(site.folder, site.folder / "tls")
    rules = {"required": True, "min_parties": 2, "roots": {"cloud": CLOUD}}
    site.settings["privacy"] = {"secure_aggregation": rules}
    site.own_files()
    return public


def events(site: Site, *names: str) -> list[dict[str, Any]]:
    code, shown = site.command("audit", "--json")
    assert code == 0, shown
    records = [json.loads(line) for line in shown.splitlines()]
    return [record for record in records if record["event"] in names]


def pool_files(site: Site, key: str) -> Path:
    return Path(site.settings["run_dir"]) / key


def test_tasks_get_their_keys_and_their_reports_survive_a_kill_of_the_bridge(site: Site, root: str) -> None:
    stub, key = site.start(), site.key()
    assert stub.DescribeSite(pb.DescribeSiteRequest(), timeout=60).signing_root == root
    wanted = spec(command=task(size=10, sha256="ab" * 32, protection="secure-aggregation"), privacy=SECURE)
    ensure(stub, key, wanted)
    running(stub, key)
    files = pool_files(site, key)
    assert Trust.read(files / "tls").roots == {"cloud": CLOUD, "test": root}
    until(lambda: all((files / "work" / str(index) / "seen").exists() for index in range(2)), "the tasks have started")
    for index in range(2):
        verify(Credential.parse((files / "work" / str(index) / "seen").read_bytes()), root)
        modes = (files / "logs" / f"{index}.log").read_text()
        assert f"600 {SIGNING_KEY_FILE}\n600 {CREDENTIAL_FILE}\n600 {TRUST_FILE}\n" in modes
    key_before = (files / "tls" / SIGNING_KEY_FILE).read_bytes()
    site.kill()
    stub = site.start()
    ensure(stub, key, wanted)
    assert (files / "tls" / SIGNING_KEY_FILE).read_bytes() == key_before
    for index in range(2):
        (files / "work" / str(index) / "done").touch()
    assert over(stub, key).phase == pb.Pool.SUCCEEDED
    until(lambda: events(site, "ended"), "the end is recorded")
    assert not (files / "tls").exists()
    left = events(site, "left")
    assert [(record["index"], record["size"], record["protection"]) for record in left] == [
        (0, 10, "secure-aggregation"), (1, 10, "secure-aggregation"),
    ]  # fmt: skip
    assert [record["event"] for record in events(site, "accepted", "ended")] == ["accepted", "ended"]
    code, shown = site.command("audit", "--verify")
    assert code == 0, shown


def test_a_pool_without_secure_aggregation_is_denied_and_recorded(site: Site, root: str) -> None:
    stub, key = site.start(), site.key()
    with pytest.raises(grpc.RpcError) as caught:
        stub.EnsurePool(pb.EnsurePoolRequest(key=key, spec=spec()), timeout=60)
    assert isinstance(caught.value, grpc.Call)
    assert (caught.value.details() or "").startswith("policy privacy.secure_aggregation.required: ")
    (denied,) = events(site, "denied")
    assert (denied["rule"], denied["key"]) == ("privacy.secure_aggregation.required", key)
    assert not site.arrays(key)
