"""Typed fields that the custom resources share. Each pattern reaches the CRD's schema as it stands."""

from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

PATTERN_DECIMAL = r"^[-+]?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?$"
PATTERN_DNS_LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
# Of a Kubernetes namespace: a label that may begin with a digit (RFC 1123).
PATTERN_NAMESPACE = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
# Of a Kubernetes object whose name need not be a label.
PATTERN_OBJECT_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
# Of a StorageClass, or empty: a claim without one binds to a volume that has none either.
PATTERN_STORAGE_CLASS = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"
# A file of task.code: no path, not hidden, and never an option of a command.
PATTERN_FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
PATTERN_ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
# What a Slurm site names: partitions, accounts, QOS, resources. Starts with a letter or digit, so never an option.
PATTERN_SLURM_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"
# An account may hold more: abc@v100, ai4s:gpu.
PATTERN_SLURM_ACCOUNT = r"^[A-Za-z0-9_][A-Za-z0-9_.+@:/-]*$"
PATTERN_METRIC = r"^[A-Za-z_][A-Za-z0-9_.-]*$"
# Of an annotation, or of whatever else has a name with an optional domain before it.
PATTERN_ANNOTATION = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
PATTERN_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"
PATTERN_HOST_PORT = r"^(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?):[0-9]{1,5}$"
# A class in a Python module.
PATTERN_CLASS = r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$"
# An OCI reference. Starts with a letter or digit, so never an option of a command.
PATTERN_IMAGE = r"^[A-Za-z0-9][A-Za-z0-9._/:@+-]*$"

# Of the normal numbers of float32, rounded inwards.
_LEAST_SINGLE, _MOST_SINGLE = 1.2e-38, 3.4e38

Decimal = Annotated[str, Field(pattern=PATTERN_DECIMAL, max_length=32)]
DnsLabel = Annotated[str, Field(pattern=PATTERN_DNS_LABEL, max_length=63)]
Namespace = Annotated[str, Field(pattern=PATTERN_NAMESPACE, max_length=63)]
ObjectName = Annotated[str, Field(pattern=PATTERN_OBJECT_NAME, max_length=253)]
EnvName = Annotated[str, Field(pattern=PATTERN_ENV_NAME, max_length=128)]
SlurmName = Annotated[str, Field(pattern=PATTERN_SLURM_NAME, max_length=64)]
SlurmAccount = Annotated[str, Field(pattern=PATTERN_SLURM_ACCOUNT, max_length=64)]
Quantity = Annotated[str, Field(pattern=PATTERN_QUANTITY, max_length=32)]
ClassReference = Annotated[str, Field(pattern=PATTERN_CLASS, max_length=256)]
HostPort = Annotated[str, Field(pattern=PATTERN_HOST_PORT, max_length=260)]
Cidr = Annotated[str, Field(max_length=49, pattern=r"^[0-9A-Fa-f:.]+/[0-9]{1,3}$")]
Image = Annotated[str, Field(pattern=PATTERN_IMAGE, max_length=512)]
Argument = Annotated[str, Field(max_length=4096)]
Text = Annotated[str, Field(max_length=4096)]
# A pod template (or a part of one), passed through as it is.
PodTemplate = Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]


def exactly(number: str | float) -> Fraction:
    """The number that a manifest wrote, or a float was made from: 0.1 is a tenth, which no binary float is."""
    return Fraction(str(float(number)))


def single_precision_problem(text: str) -> str | None:
    """Return why float32 cannot hold a finite number (it would become 0 or infinity), or ``None``."""
    mantissa = text.lower().partition("e")[0]
    if any(digit in "123456789" for digit in mantissa) and not _LEAST_SINGLE <= abs(float(text)) <= _MOST_SINGLE:
        return f"must be from {_LEAST_SINGLE:g} to {_MOST_SINGLE:g} in size, which single precision holds, not {text}"
    return None


def list_map(*keys: str) -> dict[str, Any]:
    """Schema marks of a list whose items are told apart by ``keys`` (the API server refuses duplicates)."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


class Resource(BaseModel):
    """Base of every model in a custom resource: camelCase outside, immutable, unknown fields refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )
