"""Random values that values.schema.json accepts, for Hypothesis."""

import json
from typing import Any

from hypothesis import strategies as st

from .conftest import CHART

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
# Strings that YAML does not read as strings unless quoted.
ODD_WORDS = (
    "123", "0x1F", "1e3", "1.10", "true", "no", "null", "~", "", " x ", "a: b", "a #b", "# a", "- a", "-", "[a", "{a",
    "'a", '"a', "a'b\"c", "*a", "&a", "!a", "%a", "@a", "`a", "|", ">", "a\\nb", "a\nb", "a:", ":a", "?", "ü€",
    "$a", "2026-11-29", "0o17", "1_000", "a\tb",
)  # fmt: skip
# Odd strings that are also valid names of an object, a class or a namespace.
ODD_NAMES = ("123", "1e3", "true", "no", "null", "0x1f", "y", "a-b", "2024-team", "0", "1-1")
ODD_LABELS = ("123", "1e3", "1.10", "true", "no", "null", "", "a_b", "0x1F", "2026-11-29")

_PEER = {"namespaceSelector": {"matchLabels": {"a": "1"}}}
_RULE = {"sourceLabels": ["a"], "regex": "1", "action": "drop"}
_SPREAD = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
# Parts of Kubernetes' own objects, whose schema the chart does not repeat, by the last key of their path.
_PARTS: dict[str, list[dict[str, Any]]] = {
    "affinity": [{"podAntiAffinity": {}}],
    "containers": [{"name": "client", "image": "a"}],
    "dnsConfig": [{"nameservers": ["192.0.2.1"], "options": [{"name": "ndots", "value": "2"}]}],
    "egress": [{"ports": [{"port": 443, "protocol": "TCP"}]}, {"to": [_PEER]}],
    "env": [{"name": "A", "value": word} for word in ODD_WORDS],
    "envFrom": [{"configMapRef": {"name": "123"}}],
    "extraContainers": [{"name": "audit", "image": "a:1", "args": ["1", "true"]}],
    "extraEnv": [{"name": "A", "value": word} for word in ODD_WORDS],
    "extraEnvFrom": [{"secretRef": {"name": "true"}}],
    "extraInitContainers": [{"name": "wait", "image": "a:1"}],
    "extraVolumeMounts": [{"name": "a", "mountPath": "/a"}],
    "extraVolumes": [{"name": "a", "configMap": {"name": "123"}}],
    "gatewayFrom": [_PEER, {"ipBlock": {"cidr": "2001:db8::/32"}}],
    "hostAliases": [{"ip": "192.0.2.9", "hostnames": ["a.example"]}],
    "imagePullSecrets": [{"name": name} for name in ODD_NAMES],
    "initContainers": [{"name": "a", "image": "a"}],
    "metricRelabelings": [_RULE],
    "metricsFrom": [_PEER],
    "namespaceSelector": [{"matchLabels": {"a": "1"}}, {"matchExpressions": [{"key": "a", "operator": "Exists"}]}],
    "objectSelector": [{"matchLabels": {"a": "true"}}],
    "podSecurityContext": [{"runAsNonRoot": True, "supplementalGroups": [1000710000]}],
    "relabelings": [_RULE],
    "resources": [{"requests": {"cpu": "1", "memory": "1Gi"}}],
    "securityContext": [{"runAsUser": 1000710000}],
    "tolerations": [{"operator": "Exists"}, {"key": "a", "operator": "Equal", "value": "1", "effect": "NoSchedule"}],
    "topologySpreadConstraints": [_SPREAD],
    "volumeMounts": [{"name": "a", "mountPath": "/a"}],
    "volumes": [{"name": "a", "emptyDir": {}}],
}
_EXTRA_OBJECTS: list[Any] = [
    {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "more"}, "data": {str(i): word}}
    for i, word in enumerate(ODD_WORDS)
] + ["apiVersion: v1\nkind: ConfigMap\nmetadata: {name: more, namespace: '{{ .Release.Namespace }}'}\n"]


def _strings(schema: dict[str, Any], key: str) -> st.SearchStrategy[str]:
    if "pattern" in schema:
        longest = schema.get("maxLength", 1000)
        # Include long strings, because names of objects are derived from them.
        made = st.from_regex(schema["pattern"], fullmatch=True).filter(lambda text: len(text) <= longest)
        return made.filter(lambda text: text.isascii() and "\n" not in text)
    words = ODD_LABELS if key.lower().endswith("labels") or key == "nodeSelector" else ODD_WORDS
    return st.sampled_from(words).filter(lambda text: len(text) >= schema.get("minLength", 0))


def _numbers(schema: dict[str, Any]) -> st.SearchStrategy[int]:
    least = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
    return st.integers(least, schema.get("maximum", 2**31 - 1))


def drawn(schema: dict[str, Any], key: str = "") -> st.SearchStrategy[Any]:
    """Return random values for the schema of ``key``."""
    kind = schema.get("type", "")
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if key == "extraObjects" and kind != "array":
        return st.sampled_from(_EXTRA_OBJECTS)
    if isinstance(kind, list):
        return st.one_of(*(drawn({**schema, "type": item}, key) for item in kind))
    if kind == "null":
        return st.none()
    if kind == "boolean":
        return st.booleans()
    if kind in ("integer", "number"):
        return _numbers(schema)
    if kind == "string":
        return _strings(schema, key)
    if kind == "array":
        unique = json.dumps if schema.get("uniqueItems") or key == "imagePullSecrets" else None
        return st.lists(drawn(schema["items"], key), unique_by=unique, min_size=schema.get("minItems", 0), max_size=2)
    more = schema.get("additionalProperties")
    if isinstance(more, dict):
        return st.dictionaries(st.sampled_from(["a", "example.com/b", "c.d/e-f"]), drawn(more, key), max_size=2)
    if "properties" not in schema:
        return st.sampled_from(_PARTS[key])
    parts = {name: drawn(inner, name) for name, inner in schema["properties"].items()}
    required = schema.get("required", [])
    return st.fixed_dictionaries({name: parts.pop(name) for name in required}, optional=parts)


VALUES = drawn(SCHEMA)
