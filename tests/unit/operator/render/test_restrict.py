"""Tests of forbidden settings in users' templates and of their allowances."""

from typing import Any

import pytest

from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_operator.planning import acceptance
from isthmus_operator.planning.acceptance import Acceptance, Rejection, examine
from isthmus_operator.render.restrict import ALLOWANCES, HOST_NAMESPACES, HOST_PATH, PRIVILEGED, SERVICE_ACCOUNT
from tests.support.fake_cluster import job, spec, standing

APPARMOR = "container.apparmor.security.beta.kubernetes.io/"
NONE: frozenset[str] = frozenset()


def container(**fields: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "client", **fields}]}}


def security(**fields: Any) -> dict[str, Any]:
    return container(securityContext=fields)


CASES: list[tuple[str, dict[str, Any], str]] = [
    (HOST_PATH, {"spec": {"volumes": [{"name": "data", "hostPath": {"path": "/"}}]}}, "spec.volumes[data].hostPath"),
    (PRIVILEGED, {"spec": {"volumes": [{"name": "x", "nfs": {"server": "a", "path": "/"}}]}}, "spec.volumes[x].nfs"),
    (HOST_NAMESPACES, {"spec": {"hostNetwork": True}}, "spec.hostNetwork"),
    (HOST_NAMESPACES, {"spec": {"hostPID": True}}, "spec.hostPID"),
    (HOST_NAMESPACES, {"spec": {"hostIPC": True}}, "spec.hostIPC"),
    (HOST_NAMESPACES, container(ports=[{"containerPort": 80, "hostPort": 80}]),
     "spec.containers[client].ports[0].hostPort"),
    (SERVICE_ACCOUNT, {"spec": {"serviceAccountName": "admin"}}, "spec.serviceAccountName"),
    (SERVICE_ACCOUNT, {"spec": {"serviceAccount": "admin"}}, "spec.serviceAccount"),
    (SERVICE_ACCOUNT, {"spec": {"automountServiceAccountToken": True}}, "spec.automountServiceAccountToken"),
    (SERVICE_ACCOUNT,
     {"spec": {"volumes": [{"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}]}},
     "spec.volumes[t].projected.sources[0].serviceAccountToken"),
    (PRIVILEGED, security(privileged=True), "spec.containers[client].securityContext.privileged"),
    (PRIVILEGED, security(allowPrivilegeEscalation=True), "allowPrivilegeEscalation"),
    (PRIVILEGED, security(capabilities={"add": ["SYS_ADMIN"]}), "capabilities.add"),
    (PRIVILEGED, security(capabilities={"drop": []}), "capabilities.drop"),
    (PRIVILEGED, security(procMount="Unmasked"), "procMount"),
    (PRIVILEGED, security(runAsNonRoot=False), "runAsNonRoot"),
    (PRIVILEGED, security(runAsUser=0), "runAsUser"),
    (PRIVILEGED, security(seccompProfile={"type": "Unconfined"}), "seccompProfile"),
    (PRIVILEGED, security(seLinuxOptions={"type": "spc_t"}), "seLinuxOptions"),
    (PRIVILEGED, security(appArmorProfile={"type": "Unconfined"}),
     "spec.containers[client].securityContext.appArmorProfile"),
    (PRIVILEGED, {"spec": {"securityContext": {"appArmorProfile": {"type": "Unconfined"}}}},
     "spec.securityContext.appArmorProfile"),
    (PRIVILEGED, {"metadata": {"annotations": {f"{APPARMOR}client": "unconfined"}}},
     f"metadata.annotations[{APPARMOR}client]"),
    (PRIVILEGED, security(windowsOptions={"hostProcess": True}), "hostProcess"),
    (PRIVILEGED, {"spec": {"securityContext": None}}, "runAsNonRoot"),
    (PRIVILEGED, {"spec": {"securityContext": {"runAsUser": 0}}}, "spec.securityContext.runAsUser"),
    (PRIVILEGED, {"spec": {"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}}}, "sysctls[0]"),
    (PRIVILEGED, {"spec": {"securityContext": {"sysctls": [{"name": ["x"]}]}}}, "the sysctl ['x']"),
    (PRIVILEGED, {"spec": {"initContainers": [{"name": "i", "securityContext": {"privileged": True}}]}},
     "spec.initContainers[i].securityContext.privileged"),
    (PRIVILEGED, {"spec": {"containers": [{"name": "side", "securityContext": {"privileged": True}}]}},
     "spec.containers[side].securityContext.privileged"),
]  # fmt: skip
FINE: list[dict[str, Any]] = [
    {},
    {"spec": {"nodeSelector": {"gpu": "yes"}, "priorityClassName": "low", "tolerations": [{"operator": "Exists"}],
              "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "z", "whenUnsatisfiable": "DoNotSchedule"}],
              "serviceAccountName": "default"}},
    container(resources={"limits": {"nvidia.com/gpu": "1"}}),
    {"spec": {"volumes": [{"name": "d", "persistentVolumeClaim": {"claimName": "data"}}]}},
    # Added containers are hardened like the operator's own.
    {"spec": {"initContainers": [{"name": "fetch", "image": "i"}], "containers": [{"name": "side", "image": "i"}]}},
    container(securityContext=None),
    security(appArmorProfile={"type": "RuntimeDefault"}),
    security(appArmorProfile={"type": "Localhost", "localhostProfile": "mine"}),
    {"metadata": {"annotations": {f"{APPARMOR}client": "runtime/default", f"{APPARMOR}side": "localhost/mine"}}},
    security(capabilities=None),
    security(capabilities={"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}, runAsUser=1000),
]  # fmt: skip


def wanted(template: dict[str, Any], where: str = "client") -> dict[str, Any]:
    if where == "client":
        return spec(pools=[{"name": "cloud", "replicas": 2, "cloud": {"template": template}}])
    renamed = {"spec": dict(template.get("spec", {}))}
    for item in renamed["spec"].get("containers", []):
        item["name"] = {"client": "aggregator"}.get(item["name"], item["name"])
    return spec(aggregator={"template": renamed})


@pytest.mark.parametrize(("need", "template", "path"), CASES, ids=[case[2] for case in CASES])
def test_it_is_refused_unless_allowed(need: str, template: dict[str, Any], path: str) -> None:
    bad = wanted(template)
    verdict = examine(job(bad), standing(bad, accepted=None), NONE)
    assert isinstance(verdict, Rejection)
    assert verdict.reason is Reason.TEMPLATE_NOT_ALLOWED
    assert path in verdict.message
    assert "spec.pools[0].cloud.template." in verdict.message
    assert f"the platform's admin can allow {need}" in verdict.message
    others = frozenset(ALLOWANCES) - {need}
    assert isinstance(examine(job(bad), standing(bad, accepted=None), others), Rejection)
    assert isinstance(examine(job(bad), standing(bad, accepted=None), frozenset({need})), Acceptance)


@pytest.mark.parametrize("template", FINE)
def test_ordinary_templates_are_accepted(template: dict[str, Any]) -> None:
    good = wanted(template)
    assert isinstance(examine(job(good), standing(good, accepted=None), NONE), Acceptance)


def test_the_aggregators_template_is_checked_too() -> None:
    bad = wanted({"spec": {"hostNetwork": True}}, "aggregator")
    verdict = examine(job(bad), standing(bad, accepted=None), NONE)
    assert isinstance(verdict, Rejection)
    assert verdict.message.startswith("spec.aggregator.template.spec.hostNetwork: hostNetwork is not allowed here")


def test_a_template_that_fails_unexpectedly_is_invalid(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise AttributeError("'bool' object has no attribute 'startswith'")

    monkeypatch.setattr(acceptance, "violations", fails)
    odd = wanted({"spec": {"nodeSelector": {"a": "b"}}})
    verdict = examine(job(odd), standing(odd, accepted=None), NONE)
    assert isinstance(verdict, Rejection)
    assert verdict.reason is Reason.INVALID_SPEC
    assert verdict.message.startswith(
        "spec.pools[0].cloud.template: no pod can be made from it: AttributeError: 'bool'"
    )
    assert "team/demo: spec.pools[0].cloud.template" in caplog.text
    # This also holds for a running job.
    assert isinstance(examine(job(odd), standing(odd), NONE), Rejection)


def test_a_forged_record_of_the_accepted_job_is_rejected() -> None:
    # The ConfigMap is in the user's namespace.
    forged = wanted({"spec": {"hostNetwork": True}})
    verdict = examine(job(spec()), standing(accepted=parse_spec(forged)), NONE)
    assert isinstance(verdict, Rejection)
    assert verdict.reason is Reason.TEMPLATE_NOT_ALLOWED
