"""The aggregator in a FederatedJob: its pod, its checkpoints, and its address for HPC clients."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from .fields import (
    PATTERN_ANNOTATION,
    PATTERN_STORAGE_CLASS,
    Cidr,
    HostPort,
    Image,
    PodTemplate,
    Quantity,
    Resource,
    Text,
)

MAX_ANNOTATION = 317
"""Longest name of an annotation: a domain, a slash, a label."""


class Checkpoint(Resource):
    """Storage of the checkpoints and the final model."""

    storage: Literal["PersistentVolumeClaim", "EmptyDir"] = "PersistentVolumeClaim"
    """PersistentVolumeClaim survives the loss of the aggregator's pod. EmptyDir survives only a restart within the pod,
    and the model is deleted with the pod."""
    size: Quantity = "1Gi"
    """Size of the volume: at least (keep + 6) times the model and the strategy's state. The state is one model for
    FedAvgM, and two for FedAdagrad, FedAdam and FedYogi. The robust rules need one model more for each update of a
    round."""
    storage_class_name: Annotated[str, Field(pattern=PATTERN_STORAGE_CLASS, max_length=253)] | None = None
    """Storage class of the claim, or "" for a volume that the admin provides. Default: the cluster's default class."""
    keep: Annotated[int, Field(ge=1, le=1000)] = 3
    """Number of newest checkpoints to keep. That of the best model is always kept."""


class Expose(Resource):
    """Address of the aggregator for HPC clients."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    """Type of the aggregator's Service. ClusterIP suits sites whose nodes reach the cluster's network."""
    address: HostPort | None = None
    """A fixed host:port that HPC clients use instead of the Service's own address (a gateway, a tunnel)."""
    annotations: Annotated[dict[str, Text], Field(max_length=64)] = {}
    """Annotations of the Service, such as those for an internal load balancer of a cloud."""
    external_traffic_policy: Literal["Cluster", "Local"] | None = None
    """For NodePort and LoadBalancer. Local keeps the source address, which an HPCSite's clientCIDRs need. With
    NodePort, Local means that only the node of the aggregator answers. Default: Cluster."""
    load_balancer_class: Annotated[str, Field(pattern=PATTERN_ANNOTATION, max_length=MAX_ANNOTATION)] | None = None
    """For LoadBalancer: its class. Default: the cluster's default."""
    load_balancer_source_ranges: Annotated[list[Cidr], Field(max_length=64)] = []
    """For LoadBalancer: source ranges that may connect. Default: all."""
    ip_family_policy: Literal["SingleStack", "PreferDualStack", "RequireDualStack"] | None = None
    """Default: SingleStack, in the cluster's first family."""
    ip_families: Annotated[list[Literal["IPv4", "IPv6"]], Field(max_length=2)] = []
    """IP families of the Service. HPC clients get its address in the first one. Default: the cluster's."""

    @field_validator("annotations")
    @classmethod
    def _names(cls, annotations: dict[str, str]) -> dict[str, str]:
        for name in annotations:
            if re.fullmatch(PATTERN_ANNOTATION, name) is None or len(name) > MAX_ANNOTATION:
                raise ValueError(f"{name!r} is no name of an annotation")
        return annotations

    @model_validator(mode="after")
    def _of_its_type(self) -> Self:
        if self.type == "ClusterIP" and self.external_traffic_policy is not None:
            raise ValueError("externalTrafficPolicy: goes with type NodePort or LoadBalancer")
        for name, value in (
            ("loadBalancerClass", self.load_balancer_class),
            ("loadBalancerSourceRanges", self.load_balancer_source_ranges),
        ):
            if self.type != "LoadBalancer" and value:
                raise ValueError(f"{name}: goes with type LoadBalancer")
        if len(set(self.ip_families)) != len(self.ip_families):
            raise ValueError("ipFamilies: names a family twice")
        if len(self.ip_families) == 2 and self.ip_family_policy in (None, "SingleStack"):
            raise ValueError("ipFamilies: two of them go with ipFamilyPolicy PreferDualStack or RequireDualStack")
        return self


class Aggregator(Resource):
    """The aggregator's pod."""

    image: Image | None = None
    """Image of the aggregator. Default: task.image."""
    template: PodTemplate = {}
    """Pod template overrides. The container is named aggregator."""
    checkpoint: Checkpoint = Checkpoint()
    expose: Expose = Expose()
    disruption_budget: Literal["None", "Protect"] = "None"
    """Protect: a PodDisruptionBudget keeps drains from evicting the aggregator. None: a drained aggregator starts on
    another node and resumes from its checkpoint."""
