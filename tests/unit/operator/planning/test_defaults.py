"""Tests of the admin's job defaults, which override Isthmus' own and are overridden by manifests."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_operator.__main__ import parse
from isthmus_operator.planning import actions as act
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.render import aggregator
from isthmus_operator.render.client import ClientPods
from isthmus_operator.render.defaults import JobDefaults
from isthmus_operator.render.defaults_file import DefaultsError, load
from isthmus_operator.servers.admission import review_job
from isthmus_operator.state.observed import Observed
from tests.support.fake_cluster import NOW, job, of_kind, plan, site, spec, standing

GIVEN = JobDefaults.model_validate(
    {
        "all": {
            "metadata": {"labels": {"cost": "shared"}, "annotations": {"a.example/b": "all"}},
            "spec": {
                "imagePullSecrets": [{"name": "registry"}],
                "nodeSelector": {"pool": "train", "zone": "a"},
                "tolerations": [{"key": "train", "operator": "Exists"}],
                "priorityClassName": "low",
                "runtimeClassName": "gvisor",
                "securityContext": {"runAsUser": 1234, "runAsGroup": None, "fsGroup": None},
            },
            "container": {
                "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
                "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}, {"name": "MODE", "value": "default"}],
            },
        },
        "clients": {"spec": {"priorityClassName": "lower"}, "container": {"resources": {"limits": {"memory": "4Gi"}}}},
        "aggregator": {"metadata": {"annotations": {"a.example/b": "aggregator"}}},
        "service": {
            "annotations": {"lb.example/internal": "true", "lb.example/name": "x"},
            "externalTrafficPolicy": "Local",
            "loadBalancerClass": "lb.example/internal",
            "ipFamilyPolicy": "PreferDualStack",
        },
        "storageClassName": "fast",
    }
)


def client(template: dict[str, Any] | None = None, **task: Any) -> dict[str, Any]:
    wanted = spec(pools=[{"name": "cloud", "cloud": {"template": template or {}}}])
    wanted["task"] |= task
    parsed = parse_spec(wanted)
    pod = ClientPods(job(wanted), parsed, parsed.pools[0], "", (), GIVEN).pod(0, 0)
    kubernetes_validate.validate(pod, "1.30", strict=True)
    return pod


def main(pod: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = pod["spec"]["containers"][0]
    return found


def variables(pod: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item.get("value", "") for item in main(pod)["env"]}


def test_a_manifest_that_says_nothing_gets_the_defaults() -> None:
    pod = client()
    assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["spec"]["nodeSelector"] == {"pool": "train", "zone": "a"}
    assert pod["spec"]["runtimeClassName"] == "gvisor"
    assert pod["metadata"]["labels"]["cost"] == "shared" and pod["metadata"]["labels"]["isthmus.dev/role"] == "client"
    assert variables(pod)["HTTPS_PROXY"] == "http://proxy:3128"
    # A null removes a value that Isthmus sets, and the others stay.
    context = pod["spec"]["securityContext"]
    assert context["runAsUser"] == 1234 and context["runAsNonRoot"] is True
    assert not {"runAsGroup", "fsGroup"} & set(context)
    assert main(pod)["securityContext"]["readOnlyRootFilesystem"] is True


def test_those_of_a_role_win_over_those_of_all() -> None:
    pod = client()
    assert pod["spec"]["priorityClassName"] == "lower"
    assert main(pod)["resources"] == {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "4Gi"}}
    wanted = spec()
    other = aggregator.pod(job(wanted), parse_spec(wanted), "f", (), GIVEN)
    kubernetes_validate.validate(other, "1.30", strict=True)
    assert other["spec"]["priorityClassName"] == "low"
    assert main(other)["resources"]["limits"] == {"memory": "2Gi"}
    assert other["metadata"]["annotations"]["a.example/b"] == "aggregator"


def test_the_manifest_wins_over_all_of_them() -> None:
    template = {
        "metadata": {"labels": {"cost": "mine"}},
        "spec": {
            "priorityClassName": "high",
            "runtimeClassName": None,
            "nodeSelector": {"zone": "b"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "imagePullSecrets": [{"name": "own"}],
            "securityContext": {"runAsUser": 4321},
            "containers": [{"name": "client", "resources": {"limits": {"memory": "8Gi"}}}],
        },
    }
    pod = client(template, env=[{"name": "MODE", "value": "mine"}])
    assert pod["metadata"]["labels"]["cost"] == "mine"
    assert pod["spec"]["priorityClassName"] == "high" and "runtimeClassName" not in pod["spec"]
    assert pod["spec"]["nodeSelector"] == {"pool": "train", "zone": "b"}
    assert [item["key"] for item in pod["spec"]["tolerations"]] == ["train", "gpu"]
    assert [item["name"] for item in pod["spec"]["imagePullSecrets"]] == ["registry", "own"]
    assert pod["spec"]["securityContext"]["runAsUser"] == 4321
    assert main(pod)["resources"] == {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "8Gi"}}
    # So does a variable of task.env, which is not part of a template.
    assert variables(pod)["MODE"] == "mine"


def test_the_service_and_the_claim() -> None:
    wanted = spec(aggregator={"expose": {"type": "LoadBalancer", "annotations": {"lb.example/name": "mine"}}})
    made = aggregator.service(job(wanted), parse_spec(wanted), GIVEN.service)
    kubernetes_validate.validate(made, "1.30", strict=True)
    assert made["metadata"]["annotations"] == {"lb.example/internal": "true", "lb.example/name": "mine"}
    body = made["spec"]
    assert (body["loadBalancerClass"], body["externalTrafficPolicy"]) == ("lb.example/internal", "Local")
    inside = aggregator.service(job(spec()), parse_spec(spec()), GIVEN.service)["spec"]
    assert inside["ipFamilyPolicy"] == "PreferDualStack"
    assert not {"loadBalancerClass", "externalTrafficPolicy"} & set(inside)
    own = spec(aggregator={"checkpoint": {"storageClassName": "slow"}})
    assert aggregator.claim(job(own), parse_spec(own), "fast")["spec"]["storageClassName"] == "slow"


def test_the_plan_makes_objects_with_them() -> None:
    options = PlanOptions(defaults=GIVEN)
    begun = plan(job(), Observed(sites={"site": site()}), NOW, options)
    bodies = {item.kind: item.body for item in of_kind(begun, act.Apply)}
    assert bodies["PersistentVolumeClaim"]["spec"]["storageClassName"] == "fast"
    assert bodies["Service"]["metadata"]["annotations"]["lb.example/internal"] == "true"
    pods = [item.body for item in of_kind(plan(job(), standing(), NOW, options), act.CreatePod)]
    assert pods and {pod["spec"]["runtimeClassName"] for pod in pods} == {"gvisor"}


def test_a_template_is_judged_with_the_defaults_below_it() -> None:
    # A user's template may change a sidecar of the admin only like any other container.
    given = JobDefaults.model_validate({"all": {"spec": {"containers": [{"name": "logs", "image": "logs:1"}]}}})
    template = {"spec": {"containers": [{"name": "logs", "securityContext": {"privileged": True}}]}}
    wanted = spec(pools=[{"name": "cloud", "cloud": {"template": template}}])
    body = {"metadata": {"name": "demo", "namespace": "team"}, "spec": wanted}
    answer = review_job(body, None, None, {}, frozenset(), given)
    assert not answer.allowed and "spec.containers[logs].securityContext.privileged" in answer.message


# -- the file


def loaded(tmp_path: Path, content: Any, allowed: frozenset[str] = frozenset()) -> JobDefaults:
    file = tmp_path / "defaults.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return load(file, allowed)


def test_the_file_is_loaded(tmp_path: Path) -> None:
    content = GIVEN.model_dump(mode="json", by_alias=True)
    assert loaded(tmp_path, content) == GIVEN
    assert loaded(tmp_path, "") == JobDefaults()
    settings = parse(["-A", "--job-defaults", str(tmp_path / "defaults.yaml")])
    assert settings.job_defaults == JobDefaults()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: [", "cannot be read"),
        ({"every": {}}, "jobDefaults.every: unknown field"),
        ({"service": {"externalTrafficPolicy": "Both"}}, "jobDefaults.service.externalTrafficPolicy: must be one of"),
        (
            {"all": {"container": {"image": "x"}}},
            "jobDefaults.all.container.image: belongs to the manifest, not to the defaults",
        ),
        ({"all": {"spec": {"restartPolicy": "Always"}}}, "jobDefaults.all.spec.restartPolicy: is set by Isthmus"),
        ({"clients": {"spec": {"containers": [{"name": "client"}]}}}, "'client' is set by `container`"),
        ({"clients": {"spec": {"volumes": [{"name": "isthmus-x"}]}}}, "names that begin with isthmus- are reserved"),
        ({"all": {"container": {"env": [{"name": "ISTHMUS_X"}]}}}, "names that begin with ISTHMUS_ are reserved"),
        ({"all": {"spec": {"hostNetwork": True}}}, "jobDefaults.all: spec.hostNetwork: hostNetwork is not allowed"),
        ({"all": {"metadata": {"labels": {"a": 5}}}}, "jobDefaults.all.metadata.labels.a: must be a string"),
        ({"aggregator": {"spec": {"volumes": {}}}}, "jobDefaults.aggregator.spec.volumes: must be a list"),
    ],
    ids=str,
)
def test_what_could_make_no_pod_is_refused_at_the_start(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(DefaultsError) as error:
        loaded(tmp_path, content)
    assert says in str(error.value)


def test_what_the_admin_allows_users_may_be_a_default(tmp_path: Path) -> None:
    content = {"all": {"spec": {"hostNetwork": True}}}
    assert loaded(tmp_path, content, frozenset({"host-namespaces"})).all.spec == {"hostNetwork": True}


def test_a_bad_file_ends_the_operator_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["-A", f"--job-defaults={tmp_path / 'absent.yaml'}"])
    assert "absent.yaml: cannot be read" in capsys.readouterr().err
