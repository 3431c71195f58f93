"""The aggregator's part of a FederatedJob: its pod, its checkpoints, and how HPC clients reach it."""

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
"""Of an annotation's name: a domain, a slash, a label."""


class Checkpoint(Resource):
    """Where the aggregator keeps its checkpoints and the final model."""

    storage: Literal["PersistentVolumeClaim", "EmptyDir"] = "PersistentVolumeClaim"
    """PersistentVolumeClaim survives the loss of the aggregator's pod; EmptyDir only a restart within the pod, and the
    model goes with the pod."""
    size: Quantity = "1Gi"
    """Size of the volume: at least (keep + 6) times the model and the strategy's state (FedAvgM: one model more;
    FedAdagrad, FedAdam and FedYogi: two); for the robust rules one model more for each update of a round."""
    storage_class_name: Annotated[str, Field(pattern=PATTERN_STORAGE_CLASS, max_length=253)] | None = None
    """Storage class of the claim; "" for a volume that the admin provides. Default: the cluster's default class."""
    keep: Annotated[int, Field(ge=1, le=1000)] = 3
    """How many of the newest checkpoints are kept; that of the best model always is."""


class Expose(Resource):
    """How HPC clients reach the aggregator."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    """Type of the aggregator's Service. ClusterIP suits sites whose nodes reach the cluster's network."""
    address: HostPort | None = None
    """A fixed host:port that HPC clients use instead of the Service's own address (a gateway, a tunnel)."""
    annotations: Annotated[dict[str, Text], Field(max_length=64)] = {}
    """Annotations of the Service, such as those by which a cloud makes an internal load balancer."""
    external_traffic_policy: Literal["Cluster", "Local"] | None = None
    """With NodePort and LoadBalancer. Local: the source address stays, as an HPCSite's clientCIDRs need it; with
    NodePort only the aggregator's own node answers then. Default: Cluster."""
    load_balancer_class: Annotated[str, Field(pattern=PATTERN_ANNOTATION, max_length=MAX_ANNOTATION)] | None = None
    """With LoadBalancer: who makes it. Default: the cluster's own."""
    load_balancer_source_ranges: Annotated[list[Cidr], Field(max_length=64)] = []
    """With LoadBalancer: from where it may be dialled. Default: from anywhere."""
    ip_family_policy: Literal["SingleStack", "PreferDualStack", "RequireDualStack"] | None = None
    """Default: SingleStack, in the cluster's first family."""
    ip_families: Annotated[list[Literal["IPv4", "IPv6"]], Field(max_length=2)] = []
    """Families of the Service; HPC clients are told its address in the first one. Default: the cluster's."""

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
    """Protect: a PodDisruptionBudget keeps drains from evicting the aggregator. Without it, a drained aggregator starts
    elsewhere and resumes from its checkpoint."""
