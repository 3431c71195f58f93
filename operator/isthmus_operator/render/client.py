"""The pods of cloud clients."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from isthmus_contracts import identities as ids
from isthmus_contracts.api.federated_job import FederatedJobSpec, Pool

from .. import names
from ..state.observed import Job
from . import kueue
from .defaults import NONE, JobDefaults, templates
from .pod import TLS_DIR, TLS_VOLUME, base_spec, finish, lay_code, metadata

CONTAINER = "client"


def endpoint(job: Job) -> str:
    """Return the aggregator's address for clients in the cluster.

    It is relative to the cluster's domain, which has no fixed name; the search list completes it (ndots is usually 5).
    """
    return f"{names.aggregator(job.name)}.{job.namespace}.svc:{ids.AGGREGATOR_PORT}"


class ClientPods:
    """Renderer of one cloud pool's pods: the template is merged once, and each pod is a copy.

    Raises ``TemplateError``.
    """

    def __init__(
        self,
        job: Job,
        spec: FederatedJobSpec,
        pool: Pool,
        authority: str,
        code: Sequence[str] = (),
        defaults: JobDefaults = NONE,
    ) -> None:
        self._job = job
        self._spec = spec
        self._members = kueue.members(spec).get(pool.name, 0)
        self._pool = pool
        self._first = spec.first_client(pool.name)
        container = {
            "name": CONTAINER,
            "image": spec.task.image,
            "command": list(spec.task.command),
            "env": [{"name": item.name, "value": item.value} for item in spec.task.env],
        }
        body = base_spec(container, names.pool_tls(job, pool.name), restart="Never")
        lay_code(body, job, code)
        pod_metadata = metadata(
            job,
            names.client(job, pool.name, 0, 0),
            {ids.LABEL_ROLE: names.ROLE_CLIENT, ids.LABEL_POOL: pool.name},
        )
        pod_metadata["annotations"] = {names.ANNOTATION_AUTHORITY: authority}
        shared = {
            ids.ENV_ENDPOINT: endpoint(job),
            ids.ENV_SERVER_NAME: ids.aggregator_server_name(job.uid),
            ids.ENV_TLS_DIR: TLS_DIR,
            ids.ENV_JOB_UID: job.uid,
            ids.ENV_JOB: f"{job.namespace}/{job.name}",
            ids.ENV_POOL: pool.name,
            ids.ENV_POOL_SIZE: str(pool.size),
            ids.ENV_CLIENTS: str(spec.clients_beside(pool.name)),
        }
        template: Mapping[str, Any] = pool.cloud.template if pool.cloud else {}
        reserved = [{"name": name, "value": value} for name, value in shared.items()]
        under = templates(defaults, "clients", CONTAINER, {item.name for item in spec.task.env})
        self._base = finish(pod_metadata, body, template, CONTAINER, reserved, under)

    def pod(self, index: int, attempt: int, *, alone: bool = False) -> dict[str, Any]:
        """Render the pod of one attempt of a client."""
        body = copy.deepcopy(self._base)
        body["metadata"]["name"] = names.client(self._job, self._pool.name, index, attempt)
        body["metadata"]["labels"] |= {ids.LABEL_INDEX: str(index), ids.LABEL_ATTEMPT: str(attempt)}
        if index < self._members and not alone:
            kueue.join(body, self._job, self._spec)
        for volume in body["spec"]["volumes"]:
            if volume["name"] == TLS_VOLUME:
                volume["secret"] |= self._own_certificate(index)
        main = next(item for item in body["spec"]["containers"] if item["name"] == CONTAINER)
        own = {ids.ENV_INDEX: index, ids.ENV_CLIENT: self._first + index, ids.ENV_ATTEMPT: attempt}
        main["env"] += [{"name": name, "value": str(value)} for name, value in own.items()]
        return body

    def _own_certificate(self, index: int) -> dict[str, Any]:
        """Mount only the pod's own client certificate, and its pool's signing key, from its pool's Secret."""
        crt, key = ids.client_files(index)
        files = {ids.CA_FILE: ids.CA_FILE, crt: ids.CERTIFICATE_FILE, key: ids.KEY_FILE}
        if self._spec.privacy.secure_aggregation is not None:
            files |= {name: name for name in ids.PARTY_FILES}
        return {
            "secretName": names.clients_tls(self._job, self._pool.name, index),
            "items": [{"key": name, "path": path} for name, path in files.items()],
        }
