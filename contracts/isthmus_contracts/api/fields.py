"""Typed fields shared by the custom resources. Each pattern is copied to the CRD's schema unchanged."""

from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

PATTERN_DECIMAL = r"^[-+]?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?$"
PATTERN_DNS_LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
# A Kubernetes namespace: a label that may begin with a digit (RFC 1123).
PATTERN_NAMESPACE = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
# A Kubernetes object whose name is not limited to a label.
PATTERN_OBJECT_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
# A StorageClass, or empty: a claim without a class binds to a volume without one.
PATTERN_STORAGE_CLASS = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"
# A file of task.code: no path, not hidden, and never an option of a command.
PATTERN_FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
PATTERN_ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
# Names at a Slurm site: partitions, accounts, QOS, resources. Starts with a letter or digit, so never an option.
PATTERN_SLURM_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"
# An account may have more characters: abc@v100, ai4s:gpu.
PATTERN_SLURM_ACCOUNT = r"^[A-Za-z0-9_][A-Za-z0-9_.+@:/-]*$"
PATTERN_METRIC = r"^[A-Za-z_][A-Za-z0-9_.-]*$"
# An annotation, or another name with an optional domain before it.
PATTERN_ANNOTATION = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
PATTERN_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"
PATTERN_HOST_PORT = r"^(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?):[0-9]{1,5}$"
# The public half of a party's root (Ed25519), in hexadecimal digits.
PATTERN_SIGNING_ROOT = r"^[0-9a-f]{64}$"
# A class in a Python module.
PATTERN_CLASS = r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$"
# An OCI reference. Starts with a letter or digit, so never an option of a command.
PATTERN_IMAGE = r"^[A-Za-z0-9][A-Za-z0-9._/:@+-]*$"

# Bounds of the normal numbers of float32, rounded inwards.
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
# A pod template (or a part of one), passed through unchanged.
PodTemplate = Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]


def exactly(number: str | float) -> Fraction:
    """Return the exact decimal number that was written: 0.1 is one tenth, which a binary float cannot represent."""
    return Fraction(str(float(number)))


def single_precision_problem(text: str) -> str | None:
    """Return why float32 cannot hold a finite number (it would become 0 or infinity), or ``None``."""
    mantissa = text.lower().partition("e")[0]
    if any(digit in "123456789" for digit in mantissa) and not _LEAST_SINGLE <= abs(float(text)) <= _MOST_SINGLE:
        return f"must be from {_LEAST_SINGLE:g} to {_MOST_SINGLE:g} in size, which single precision holds, not {text}"
    return None


def list_map(*keys: str) -> dict[str, Any]:
    """Return the schema marks of a list with items identified by ``keys`` (the API server refuses duplicates)."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


class Resource(BaseModel):
    """Base of all models of custom resources: camelCase in manifests, immutable, without unknown fields."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )
