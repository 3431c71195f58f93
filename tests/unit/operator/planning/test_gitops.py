"""Tests of FederatedJobs and HPCSites with GitOps tools: kstatus (Flux, Helm), and Argo CD's difference and health.

The rules are ported from what these publish: kubernetes-sigs/cli-utils, pkg/kstatus/status (generic.go, core.go), and
the three-way JSON merge patch of k8s.io/apimachinery, which Argo CD compares custom resources with.
"""

import copy
import ctypes
import ctypes.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.manifests.crd import federated_job_crd, hpc_site_crd
from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_operator.controllers.site import site_status
from isthmus_operator.effects.bridge_channels import BridgeError, NotConnectedError
from isthmus_operator.servers.admission import defaults
from isthmus_operator.state.observed import Observed, ProblemKind
from tests.support.fake_cluster import NOW, World, job, site, spec

ROOT = Path(__file__).parents[4]
CHECKS = yaml.safe_load((ROOT / "examples" / "argocd.yaml").read_text())["data"]
Manifest = dict[str, Any]


def kstatus(body: Manifest) -> str:
    metadata, status = body["metadata"], body.get("status") or {}
    if metadata.get("deletionTimestamp"):
        return "Terminating"
    if status.get("observedGeneration", metadata["generation"]) != metadata["generation"]:
        return "InProgress"
    conditions = {item["type"]: item["status"] for item in status.get("conditions") or ()}
    if conditions.get("Reconciling") == "True":
        return "InProgress"
    if conditions.get("Stalled") == "True":
        return "Failed"
    return "Current" if conditions.get("Ready", "True") == "True" else "InProgress"


def with_defaults(value: Any, schema: Manifest) -> Any:
    """Return an object as the API server stores it, with structural defaults."""
    if isinstance(value, dict):
        result = dict(value)
        for name, field in schema.get("properties", {}).items():
            if name not in result and "default" in field:
                result[name] = copy.deepcopy(field["default"])
            if name in result:
                result[name] = with_defaults(result[name], field)
        return result
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    return value


def difference(applied: Manifest, live: Manifest) -> Manifest:
    """Return the patch from the cluster's object to git's, which Argo CD reports as OutOfSync if it is not empty."""
    patch: Manifest = {}
    for name, wanted in applied.items():
        found = live.get(name)
        if isinstance(wanted, dict) and isinstance(found, dict):
            if inner := difference(wanted, found):
                patch[name] = inner
        elif wanted != found:
            patch[name] = wanted
    return patch


def schema_of(crd: Manifest, part: str) -> Manifest:
    found: Manifest = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"][part]
    return found


MANIFESTS = [
    spec(cloud=1),
    spec(pools=[{"name": "cloud", "cloud": {}}]),
    spec(pools=[{"name": "lumi", "hpc": {"siteRef": {"name": "site"}, "environment": "py"}}]),
    spec(pools=[
        {"name": "lumi", "hpc": {"siteRef": {"name": "site"}, "environment": "py",
                                 "resources": {"gres": [{"name": "gpu"}]}}},
    ]),
    spec(cloud=3, hpc=2, selection={"policy": "All"}, aggregator={"expose": {"type": "NodePort"}}),
    yaml.safe_load((ROOT / "examples" / "digits.yaml").read_text())["spec"],
    yaml.safe_load((ROOT / "examples" / "fashion-mnist.yaml").read_text())["spec"],
    yaml.safe_load((ROOT / "examples" / "secure.yaml").read_text())["spec"],
]  # fmt: skip


@pytest.mark.parametrize("wanted", MANIFESTS, ids=range(len(MANIFESTS)))
def test_argo_cd_sees_no_difference_in_what_is_defaulted(wanted: Manifest) -> None:
    stored = with_defaults(wanted, schema_of(federated_job_crd(), "spec"))
    for change in defaults({"spec": stored}):  # the webhook's
        parts = change["path"].split("/")[2:]
        target = stored
        for part in parts[:-1]:
            target = target[part]
        target[parts[-1]] = change["value"]
    assert stored != wanted, "nothing is defaulted: this test tests nothing"
    assert difference(wanted, stored) == {}
    # The operator parses both alike.
    read = parse_spec(stored)
    written_down = {"selection": read.selection, "stragglers": read.stragglers}
    assert parse_spec(wanted).model_copy(update=written_down) == read


def test_defaults_within_lists_are_described() -> None:
    pool = schema_of(federated_job_crd(), "spec")["properties"]["pools"]["items"]["properties"]
    assert "default" not in pool["replicas"] and pool["replicas"]["description"].endswith("Default: 1.")
    assert pool["role"]["description"].endswith("Default: Train.")
    hpc = pool["hpc"]["properties"]
    assert hpc["timeLimitSeconds"]["description"].endswith("Default: 3600.")
    assert "default" not in hpc["resources"]["properties"]["gres"]["items"]["properties"]["count"]


# -- health


def body_of(world: World) -> Manifest:
    return {"metadata": {"name": "demo", "generation": 1}, "status": copy.deepcopy(dict(world.job.status))}


def ended(wanted: Manifest, observed: Observed | None = None, status: Manifest | None = None) -> Manifest:
    world = World(wanted, observed)
    if status:
        world.job = job(wanted, status=status)
    world.run()
    return body_of(world)


def starting() -> Manifest:
    world = World(spec(cloud=2, hpc=2, selection={"minClients": 4}))
    world.step()
    return body_of(world)


def training() -> Manifest:
    world = World(spec(cloud=2, rounds=5))
    for _ in range(50):
        world.step()
        if world.job.status.get("phase") == "Running":
            break
        world.tick(5.0)
    return body_of(world)


def unseen() -> Manifest:
    stored = with_defaults({"spec": spec()}, {"properties": {"status": schema_of(federated_job_crd(), "status")}})
    return {"metadata": {"name": "demo", "generation": 1}, **stored}


def changed() -> Manifest:
    body = training()
    return {**body, "metadata": {**body["metadata"], "generation": 2}}


def suspended() -> Manifest:
    world = World(spec(suspend=True))
    world.run(steps=20)
    return body_of(world)


JOBS = {
    "unseen": (unseen, "InProgress", "Progressing"),
    "changed": (changed, "InProgress", "Progressing"),
    "starting": (starting, "InProgress", "Progressing"),
    "training": (training, "Current", "Healthy"),
    "complete": (lambda: ended(spec(cloud=2)), "Current", "Healthy"),
    "suspended": (suspended, "Current", "Suspended"),
    "rejected": (lambda: ended(spec(selection={"minClients": 9})), "Failed", "Degraded"),
    "no site": (lambda: ended(spec(hpc=1), Observed()), "Failed", "Degraded"),
    "failed": (lambda: ended(spec(cloud=2, hpc=2, selection={"minClients": 4}, activeDeadlineSeconds=1)), "Failed",
               "Degraded"),
}  # fmt: skip


@pytest.mark.parametrize("case", JOBS)
def test_health_of_jobs(case: str) -> None:
    make, current, argo = JOBS[case]
    body = make()
    assert kstatus(body) == current, body["status"]
    conditions = {item["type"]: item for item in body["status"].get("conditions") or ()}
    if case != "unseen":
        three = [conditions[name] for name in ("Ready", "Reconciling", "Stalled")]
        assert [item["status"] for item in three].count("True") == 1
        assert len({(item["reason"], item.get("message"), item["observedGeneration"]) for item in three}) == 1
    assert health("FederatedJob", body)[0] == argo


def reached(answer: pb.Site | BridgeError) -> Manifest:
    body: Manifest = {"metadata": {"name": "site", "generation": 1}, "spec": {}}
    return {**body, "status": site_status(body, answer, NOW)}


SITES: dict[str, tuple[pb.Site | BridgeError, str, str]] = {
    "reachable": (pb.Site(cluster="lumi"), "Current", "Healthy"),
    "unreachable": (BridgeError(ProblemKind.UNREACHABLE, "no route"), "InProgress", "Progressing"),
    "not connected": (
        NotConnectedError("no bridge is at the gateway"),
        "InProgress",
        "Progressing",
    ),
    "denied": (BridgeError(ProblemKind.DENIED, "not you"), "Failed", "Degraded"),
    "no credentials": (
        BridgeError(ProblemKind.UNREACHABLE, "Secret isthmus/bridge is missing", Reason.CREDENTIALS_MISSING),
        "Failed",
        "Degraded",
    ),
    "invalid": (BridgeError(ProblemKind.REFUSED, "InvalidSpec: endpoint", Reason.INVALID_SPEC), "Failed", "Degraded"),
}


@pytest.mark.parametrize("case", SITES)
def test_health_of_sites(case: str) -> None:
    answer, current, argo = SITES[case]
    body = reached(answer)
    assert kstatus(body) == current
    assert health("HPCSite", body)[0] == argo


def test_a_site_that_was_never_called_is_in_progress() -> None:
    stored = with_defaults({"spec": {}}, {"properties": {"status": schema_of(hpc_site_crd(), "status")}})
    body = {"metadata": {"name": "site", "generation": 1}, **stored}
    assert kstatus(body) == "InProgress"
    assert health("HPCSite", body)[0] == "Progressing"


def test_the_standard_conditions_create_no_events() -> None:
    world = World(spec(cloud=2), Observed(sites={"site": site()}))
    world.run()
    assert not {event.reason for event in world.events} & {"Progressing", "Training"}
    assert [event.reason for event in world.events].count("RoundsCompleted") == 1


def health(kind: str, body: Manifest) -> tuple[str, str]:
    """Return Argo CD's health: its check is run by Lua 5.1, as in Argo CD."""
    library = ctypes.util.find_library("lua5.1") or ctypes.util.find_library("lua-5.1")
    if library is None:
        pytest.skip("Lua 5.1's library is missing (Debian's liblua5.1-0)")
    lua = ctypes.CDLL(library)
    lua.luaL_newstate.restype = lua.lua_tolstring.restype = ctypes.c_void_p
    state = ctypes.c_void_p(lua.luaL_newstate())
    check = CHECKS[f"resource.customizations.health.isthmus.dev_{kind}"]
    program = f"local obj = {literal(body)}\nlocal function check()\n{check}\nend\nlocal made = check()\n"
    program += "return made.status .. '|' .. (made.message or '')"
    try:
        lua.luaL_openlibs(state)
        failed = lua.luaL_loadstring(state, program.encode()) or lua.lua_pcall(state, 0, 1, 0)
        text = ctypes.string_at(lua.lua_tolstring(state, ctypes.c_int(-1), None)).decode()
        assert not failed, text
    finally:
        lua.lua_close(state)
    status, _, message = text.partition("|")
    return status, message


def literal(value: Any) -> str:
    """Convert JSON to a Lua table."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"[{json.dumps(key)}] = {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "{" + ", ".join(map(literal, value)) + "}"
    return "nil" if value is None else json.dumps(value)
