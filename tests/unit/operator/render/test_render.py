"""Tests of rendered objects, templates and Pod Security."""

import itertools
import json
from typing import Any

import kubernetes_validate
import pytest

from isthmus_contracts.manifests.manifest import ManifestError, parse_spec
from isthmus_operator.render import aggregator
from isthmus_operator.render.client import ClientPods
from isthmus_operator.render.merge import TemplateError, merge_template
from tests.support.fake_cluster import UID, job, spec

PROFILE = {"type": "RuntimeDefault"}


def client_pod(template: dict[str, Any] | None = None, **task: Any) -> dict[str, Any]:
    wanted = spec(pools=[{"name": "cloud", "replicas": 3, "cloud": {"template": template or {}}}])
    wanted["task"] |= task
    parsed = parse_spec(wanted)
    return ClientPods(job(wanted), parsed, parsed.pools[0], "fingerprint").pod(2, 1)


def aggregator_pod(template: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    wanted = spec(aggregator={"template": template or {}, **settings})
    return aggregator.pod(job(wanted), parse_spec(wanted), "fingerprint")


def env(pod: dict[str, Any]) -> dict[str, str]:
    names = [item["name"] for item in pod["spec"]["containers"][0]["env"]]
    assert len(names) == len(set(names)), "a variable is there twice"
    return {item["name"]: item["value"] for item in pod["spec"]["containers"][0]["env"]}


@pytest.mark.parametrize("pod", [client_pod(), aggregator_pod()], ids=["client", "aggregator"])
def test_pods_meet_the_restricted_standard(pod: dict[str, Any]) -> None:
    body = pod["spec"]
    assert body["automountServiceAccountToken"] is False
    assert body["enableServiceLinks"] is False
    assert body["securityContext"]["runAsNonRoot"] is True
    assert body["securityContext"]["seccompProfile"] == PROFILE
    assert {"hostNetwork", "hostPID", "hostIPC"}.isdisjoint(body)
    for container in body["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"] is True
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert {"/tmp", container["workingDir"]} <= writable  # noqa: S108
    assert not [volume for volume in body["volumes"] if "hostPath" in volume]


def test_a_clients_environment() -> None:
    assert env(client_pod(env=[{"name": "ALPHA", "value": "0.3"}, {"name": "HOME", "value": "/work"}])) == {
        "HOME": "/work",
        "PYTHONUNBUFFERED": "1",
        "ALPHA": "0.3",
        "ISTHMUS_ENDPOINT": "demo-aggregator.team.svc:7443",
        "ISTHMUS_SERVER_NAME": f"{UID}.aggregator.isthmus.dev",
        "ISTHMUS_TLS_DIR": "/etc/isthmus/tls",
        "ISTHMUS_JOB_UID": UID,
        "ISTHMUS_JOB": "team/demo",
        "ISTHMUS_POOL": "cloud",
        "ISTHMUS_POOL_SIZE": "3",
        "ISTHMUS_CLIENTS": "3",
        "ISTHMUS_INDEX": "2",
        "ISTHMUS_CLIENT": "2",
        "ISTHMUS_ATTEMPT": "1",
    }


def test_a_client_pod() -> None:
    pod = client_pod()
    assert pod["metadata"]["name"] == "demo-cloud-2-1"
    assert pod["metadata"]["labels"] == {
        "app.kubernetes.io/managed-by": "isthmus-operator",
        "isthmus.dev/job": "demo",
        "isthmus.dev/job-uid": UID,
        "isthmus.dev/role": "client",
        "isthmus.dev/pool": "cloud",
        "isthmus.dev/index": "2",
        "isthmus.dev/attempt": "1",
    }
    (owner,) = pod["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("FederatedJob", UID, True)
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["spec"]["containers"][0]["terminationMessagePolicy"] == "FallbackToLogsOnError"
    secret = next(volume["secret"] for volume in pod["spec"]["volumes"] if volume["name"] == "isthmus-tls")
    assert secret == {
        "secretName": "demo-cloud-tls",
        "defaultMode": 0o440,
        "items": [
            {"key": "ca.crt", "path": "ca.crt"},
            {"key": "2.crt", "path": "tls.crt"},
            {"key": "2.key", "path": "tls.key"},
        ],
    }


def test_the_aggregators_pod_and_its_volume() -> None:
    pod = aggregator_pod(image="other")
    (container,) = pod["spec"]["containers"]
    assert container["image"] == "other"
    assert container["command"][:5] == ["python", "-m", "isthmus.aggregator", "--job", "/etc/isthmus/job/job.json"]
    assert container["readinessProbe"]["tcpSocket"] == {"port": 7443}
    assert pod["spec"]["restartPolicy"] == "OnFailure"
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert volumes["isthmus-state"]["persistentVolumeClaim"] == {"claimName": "demo-checkpoints"}
    empty = aggregator_pod(checkpoint={"storage": "EmptyDir", "size": "2Gi"})
    assert {"name": "isthmus-state", "emptyDir": {"sizeLimit": "2Gi"}} in empty["spec"]["volumes"]


def test_the_job_file_holds_the_whole_accepted_spec() -> None:
    wanted = spec(hpc=2)
    body = aggregator.job_file(job(wanted), parse_spec(wanted))
    assert body["immutable"] is True
    content = json.loads(body["data"]["job.json"])
    assert (content["name"], content["namespace"], content["uid"]) == ("demo", "team", UID)
    assert content["spec"]["stragglers"]["roundDeadlineSeconds"] == 3600
    assert parse_spec(content["spec"]) == parse_spec(wanted)


def test_the_service_names_its_port_as_meshes_read_it() -> None:
    wanted = spec()
    made = aggregator.service(job(wanted), parse_spec(wanted))
    (port,) = made["spec"]["ports"]
    # Istio uses appProtocol or else the name up to the first dash: grpc would mean HTTP/2 without TLS.
    assert (port["name"].partition("-")[0], port["appProtocol"], port["port"]) == ("tls", "tls", 7443)
    assert made["spec"].keys() == {"type", "selector", "ports"} and "annotations" not in made["metadata"]
    (container,) = aggregator_pod()["spec"]["containers"]
    assert {item["name"] for item in container["ports"]} == {"tls-grpc", "metrics"}
    listens = [value for flag, value in itertools.pairwise(container["command"]) if flag in ("--listen", "--metrics")]
    assert listens == ["[::]:7443", "[::]:9090"]


def test_the_service_is_exposed_as_the_manifest_says() -> None:
    expose = {
        "type": "LoadBalancer",
        "annotations": {"service.beta.kubernetes.io/azure-load-balancer-internal": "true"},
        "externalTrafficPolicy": "Local",
        "loadBalancerClass": "service.k8s.aws/nlb",
        "loadBalancerSourceRanges": ["192.0.2.0/24"],
        "ipFamilyPolicy": "PreferDualStack",
        "ipFamilies": ["IPv6", "IPv4"],
    }
    wanted = spec(aggregator={"expose": expose})
    made = aggregator.service(job(wanted), parse_spec(wanted))
    kubernetes_validate.validate(made, "1.30", strict=True)
    assert made["metadata"]["annotations"] == expose.pop("annotations")
    assert {key: made["spec"][key] for key in expose} == expose


@pytest.mark.parametrize(
    ("expose", "says"),
    [
        ({"externalTrafficPolicy": "Local"}, "externalTrafficPolicy: goes with type NodePort or LoadBalancer"),
        ({"type": "NodePort", "loadBalancerClass": "a.example/b"}, "loadBalancerClass: goes with type LoadBalancer"),
        ({"type": "NodePort", "loadBalancerSourceRanges": ["::/0"]}, "loadBalancerSourceRanges: goes with type"),
        ({"ipFamilies": ["IPv4", "IPv6"]}, "two of them go with ipFamilyPolicy"),
        ({"ipFamilies": ["IPv4", "IPv4"], "ipFamilyPolicy": "PreferDualStack"}, "names a family twice"),
        ({"annotations": {"no name": "x"}}, "'no name' is no name of an annotation"),
    ],
)
def test_invalid_services_are_refused(expose: dict[str, Any], says: str) -> None:
    with pytest.raises(ManifestError, match=f"spec.aggregator.expose.*{says}"):
        parse_spec(spec(aggregator={"expose": expose}))


def test_the_claim() -> None:
    wanted = spec(aggregator={"checkpoint": {"size": "7Gi", "storageClassName": "fast"}})
    body = aggregator.claim(job(wanted), parse_spec(wanted))
    assert body["spec"]["resources"] == {"requests": {"storage": "7Gi"}}
    assert body["spec"]["storageClassName"] == "fast"


def test_a_template_is_merged_as_kubernetes_would() -> None:
    pod = client_pod(
        {
            "metadata": {"labels": {"team": "a", "isthmus.dev/index": "9"}, "annotations": {"note": "x"}},
            "spec": {
                "nodeSelector": {"gpu": "yes"},
                "tolerations": [{"key": "gpu", "operator": "Exists"}],
                "securityContext": {"runAsUser": 1000},
                "containers": [
                    {
                        "name": "client",
                        "resources": {"limits": {"cpu": "2"}},
                        "env": [{"name": "EXTRA", "value": "1"}, {"name": "PYTHONUNBUFFERED", "value": "0"}],
                        "volumeMounts": [{"name": "data", "mountPath": "/data", "readOnly": True}],
                    },
                    {"name": "helper", "image": "h"},
                ],
                "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "cohort"}}],
            },
        }
    )
    assert pod["metadata"]["labels"]["team"] == "a"
    assert pod["metadata"]["labels"]["isthmus.dev/index"] == "2"
    assert pod["metadata"]["annotations"]["note"] == "x"
    body = pod["spec"]
    assert (body["nodeSelector"], len(body["tolerations"])) == ({"gpu": "yes"}, 1)
    assert body["securityContext"]["runAsUser"] == 1000
    assert body["securityContext"]["runAsNonRoot"] is True
    main, helper = body["containers"]
    hardened = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert helper == {"name": "helper", "image": "h", "securityContext": hardened}
    assert main["image"] == "img"
    assert main["resources"] == {"limits": {"cpu": "2"}}
    assert {mount["mountPath"] for mount in main["volumeMounts"]} == {"/etc/isthmus/tls", "/tmp", "/work", "/data"}  # noqa: S108
    assert env(pod)["PYTHONUNBUFFERED"] == "0"
    assert env(pod)["EXTRA"] == "1"
    assert {volume["name"] for volume in body["volumes"]} >= {"isthmus-tls", "data"}


def test_null_removes_a_field() -> None:
    pod = client_pod({"spec": {"securityContext": {"runAsUser": None}}})
    assert "runAsUser" not in pod["spec"]["securityContext"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"kind": "Pod"}, "kind: unknown field; a pod template has metadata and spec"),
        ({"spec": []}, "spec: must be a mapping"),
        ({"metadata": {"name": "x"}}, "metadata.name: only labels and annotations can be set"),
        ({"metadata": {"labels": {"a": 1}}}, "metadata.labels.a: must be a string (put it in quotes)"),
        ({"spec": {"containers": {"name": "client"}}}, "spec.containers: must be a list"),
        ({"spec": {"containers": None}}, "spec.containers: the container 'client' cannot be removed"),
        ({"spec": {"containers": [{"image": "x"}]}}, "spec.containers[0].name: is missing"),
        ({"spec": {"containers": ["client"]}}, "spec.containers[0]: must be a mapping"),
        ({"spec": {"securityContext": "none"}}, "spec.securityContext: must be a mapping"),
        ({"spec": {"initContainers": 5}}, "spec.initContainers: must be a list"),
        # A YAML ``NO``.
        ({"spec": {"containers": [{"name": "client", "env": [{"name": False, "value": "x"}]}]}},
         "spec.containers[0].env[0].name: must be a string (put it in quotes)"),
        ({"spec": {"containers": [{"name": "client", "env": [{"name": 5, "value": "x"}]}]}},
         "spec.containers[0].env[0].name: must be a string (put it in quotes)"),
        ({"spec": {"containers": [{"name": "client", "ports": [{"containerPort": "web"}]}]}},
         "spec.containers[0].ports[0].containerPort: must be a number"),
        ({"spec": {"containers": [{"name": "client", "securityContext": {"capabilities": {"add": 5}}}]}},
         "spec.containers[client].securityContext.capabilities.add: must be a list of strings"),
        ({"spec": {"initContainers": [{"name": "i", "securityContext": {"capabilities": {"add": "SYS_ADMIN"}}}]}},
         "spec.initContainers[i].securityContext.capabilities.add: must be a list of strings"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_merged_is_an_error(template: dict[str, Any], message: str) -> None:
    with pytest.raises(TemplateError) as error:
        client_pod(template)
    assert str(error.value) == message


@pytest.mark.parametrize("template", [{"metadata": None}, {"spec": None}, {"metadata": None, "spec": None}])
def test_a_part_that_is_left_empty_asks_for_nothing(template: dict[str, Any]) -> None:
    assert client_pod(template) == client_pod({})


def test_merging_leaves_both_sides_alone() -> None:
    base: dict[str, Any] = {"metadata": {"labels": {}}, "spec": {"containers": [{"name": "c", "env": []}]}}
    template: dict[str, Any] = {"spec": {"containers": [{"name": "c", "env": [{"name": "A", "value": "1"}]}]}}
    merged = merge_template(base, template, "c")
    merged["spec"]["containers"][0]["env"][0]["value"] = "2"
    assert base["spec"]["containers"][0]["env"] == []
    assert template["spec"]["containers"][0]["env"][0]["value"] == "1"
