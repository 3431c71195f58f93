"""The aggregator's job file, Service, claim and pod."""

import json
from collections.abc import Sequence
from typing import Any

from isthmus_contracts import identities as ids
from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.wire.addresses import ANYWHERE

from .. import names
from ..state.observed import Job
from .defaults import NONE, JobDefaults, ServiceDefaults, templates
from .pod import TLS_DIR, base_spec, finish, lay_code, metadata, owned

CONTAINER = "aggregator"
JOB_DIR = "/etc/isthmus/job"
STATE_DIR = "/var/lib/isthmus"
# Service meshes derive the protocol from the name: grpc would mean HTTP/2 without TLS.
PORT = "tls-grpc"


def job_file(job: Job, spec: FederatedJobSpec) -> dict[str, Any]:
    """Render the ConfigMap with the accepted job. It is immutable, and also the record of what was accepted."""
    content = {
        "name": job.name,
        "namespace": job.namespace,
        "uid": job.uid,
        "spec": spec.model_dump(mode="json", by_alias=True),
    }
    text = json.dumps(content, indent=1)
    return owned(job, "ConfigMap", names.job_file(job.name), {"data": {names.JOB_FILE: text}, "immutable": True})


def service(job: Job, spec: FederatedJobSpec, defaults: ServiceDefaults | None = None) -> dict[str, Any]:
    """Render the Service of the aggregator. ``defaults``: the admin's, for fields that the manifest leaves open."""
    expose, under = spec.aggregator.expose, defaults or ServiceDefaults()
    port = {"name": PORT, "port": ids.AGGREGATOR_PORT, "targetPort": ids.AGGREGATOR_PORT, "protocol": "TCP"}
    body: dict[str, Any] = {
        "type": expose.type,
        "selector": {ids.LABEL_JOB_UID: job.uid, ids.LABEL_ROLE: names.ROLE_AGGREGATOR},
        "ports": [{**port, "appProtocol": "tls"}],
    }
    families = expose if expose.ip_family_policy or expose.ip_families else under
    optional: dict[str, Any] = {"ipFamilyPolicy": families.ip_family_policy, "ipFamilies": families.ip_families}
    if expose.type != "ClusterIP":
        optional["externalTrafficPolicy"] = expose.external_traffic_policy or under.external_traffic_policy
    if expose.type == "LoadBalancer":
        optional["loadBalancerClass"] = expose.load_balancer_class or under.load_balancer_class
        ranges = expose.load_balancer_source_ranges or under.load_balancer_source_ranges
        optional["loadBalancerSourceRanges"] = ranges
    body |= {key: value for key, value in optional.items() if value}
    made = owned(job, "Service", names.aggregator(job.name), {"spec": body})
    if annotations := {**under.annotations, **expose.annotations}:
        made["metadata"]["annotations"] = annotations
    return made


def claim(job: Job, spec: FederatedJobSpec, default_class: str | None = None) -> dict[str, Any]:
    """Render the claim for checkpoints and the final model."""
    checkpoint = spec.aggregator.checkpoint
    body: dict[str, Any] = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": checkpoint.size}},
    }
    named = default_class if checkpoint.storage_class_name is None else checkpoint.storage_class_name
    if named is not None:
        body["storageClassName"] = named
    return owned(job, "PersistentVolumeClaim", names.checkpoints(job.name), {"spec": body})


def pod(
    job: Job,
    spec: FederatedJobSpec,
    authority: str,
    code: Sequence[str] = (),
    defaults: JobDefaults = NONE,
    former: str = "",
) -> dict[str, Any]:
    """Render the aggregator's pod. Raises ``TemplateError``.

    ``authority``: fingerprint of the CA of its certificates. ``code``: names of the job's files, which may contain a
    custom strategy. ``former``: uid of the job whose checkpoints it continues.
    """
    checkpoint = spec.aggregator.checkpoint
    container = {
        "name": CONTAINER,
        "image": spec.aggregator.image or spec.task.image,
        "command": [
            "python", "-m", "isthmus.aggregator",
            "--job", f"{JOB_DIR}/{names.JOB_FILE}",
            "--tls", TLS_DIR,
            "--state", STATE_DIR,
            "--listen", f"{ANYWHERE}:{ids.AGGREGATOR_PORT}",
            "--metrics", f"{ANYWHERE}:{ids.METRICS_PORT}",
            *(("--former-job", former) if former else ()),
        ],
        "ports": [
            {"name": PORT, "containerPort": ids.AGGREGATOR_PORT, "protocol": "TCP"},
            {"name": "metrics", "containerPort": ids.METRICS_PORT, "protocol": "TCP"},
        ],
        "readinessProbe": {"tcpSocket": {"port": ids.AGGREGATOR_PORT}, "periodSeconds": 2, "failureThreshold": 3},
        "volumeMounts": [
            {"name": "isthmus-job", "mountPath": JOB_DIR, "readOnly": True},
            {"name": "isthmus-state", "mountPath": STATE_DIR},
        ],
    }  # fmt: skip
    # Restarted in place after a crash: faster than a new pod, and an emptyDir keeps the checkpoints.
    body = base_spec(container, names.aggregator_tls(job.name), restart="OnFailure")
    state: dict[str, Any] = {"name": "isthmus-state"}
    if checkpoint.storage == "PersistentVolumeClaim":
        state["persistentVolumeClaim"] = {"claimName": names.checkpoints(job.name)}
    else:
        state["emptyDir"] = {"sizeLimit": checkpoint.size}
    config = {"name": names.job_file(job.name), "items": [{"key": names.JOB_FILE, "path": names.JOB_FILE}]}
    lay_code(body, job, code)
    body["volumes"] += [{"name": "isthmus-job", "configMap": config}, state]
    pod_metadata = metadata(job, names.aggregator(job.name), {ids.LABEL_ROLE: names.ROLE_AGGREGATOR})
    pod_metadata["annotations"] = {names.ANNOTATION_AUTHORITY: authority}
    under = templates(defaults, "aggregator", CONTAINER)
    return finish(pod_metadata, body, spec.aggregator.template, CONTAINER, (), under)
