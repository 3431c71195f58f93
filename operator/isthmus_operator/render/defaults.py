"""The admin's defaults for all jobs, merged into their pods and Services; manifests override them."""

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from isthmus_contracts.api.fields import PATTERN_STORAGE_CLASS, Cidr, PodTemplate, Resource, Text


class PodDefaults(Resource):
    """Defaults for pods."""

    metadata: PodTemplate = {}
    """Labels and annotations."""
    spec: PodTemplate = {}
    container: PodTemplate = {}
    """Fields of the main container."""


class ServiceDefaults(Resource):
    """Defaults for the aggregators' Services, as in a manifest's aggregator.expose.

    Fields that do not apply to a Service's type are left out of it.
    """

    annotations: dict[str, Text] = {}
    external_traffic_policy: Literal["Cluster", "Local"] | None = None
    load_balancer_class: str | None = None
    load_balancer_source_ranges: list[Cidr] = []
    ip_family_policy: Literal["SingleStack", "PreferDualStack", "RequireDualStack"] | None = None
    ip_families: list[Literal["IPv4", "IPv6"]] = []


class JobDefaults(Resource):
    """The file that ``--job-defaults`` names."""

    all: PodDefaults = PodDefaults()
    """Defaults for all pods."""
    aggregator: PodDefaults = PodDefaults()
    clients: PodDefaults = PodDefaults()
    service: ServiceDefaults = ServiceDefaults()
    storage_class_name: Annotated[str, Field(pattern=PATTERN_STORAGE_CLASS)] | None = None
    """The storage class of the checkpoints' claims."""


NONE = JobDefaults()


def templates(
    given: JobDefaults, role: Literal["aggregator", "clients"], container: str, taken: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the pod templates to merge, in ascending precedence. ``taken``: variables that the manifest sets."""
    for one in (given.all, given.aggregator if role == "aggregator" else given.clients):
        template: dict[str, Any] = {"metadata": one.metadata, "spec": dict(one.spec)}
        if one.container:
            own = {**one.container, "name": container}
            if isinstance(own.get("env"), list):
                own["env"] = [item for item in own["env"] if _name(item) not in taken]
            template["spec"]["containers"] = [own, *(one.spec.get("containers") or ())]
        if one.metadata or template["spec"]:
            yield template


def _name(item: Any) -> Any:
    return item.get("name") if isinstance(item, Mapping) else None
