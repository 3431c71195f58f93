"""Helm, found in PATH or in the cache of `python -m lab install`, and the objects that it renders."""

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "isthmus"
NAMESPACE = "isthmus-system"
Manifest = dict[str, Any]

GROUP = "monitoring.coreos.com"
# Kinds and versions of the Prometheus Operator's API, and the options that make Helm assume that a cluster has them.
MONITORING = {"ServiceMonitor": "v1", "PodMonitor": "v1", "PrometheusRule": "v1", "ScrapeConfig": "v1alpha1"}
WITH_MONITORING = [
    word for kind, version in MONITORING.items() for word in ("--api-versions", f"{GROUP}/{version}/{kind}")
]

# Settings of each monitor.
SCRAPE: Manifest = {
    "scrapeTimeout": "10s",
    "namespace": "monitoring",
    "annotations": {"example.com/reviewed": "yes"},
    "relabelings": [{"targetLabel": "cluster", "replacement": "prod-1"}],
    "metricRelabelings": [{"sourceLabels": ["__name__"], "regex": "python_.*", "action": "drop"}],
}
DIGEST = f"sha256:{'0' * 64}"
# Values, from the defaults to everything at once.
MATRIX: dict[str, Manifest] = {
    "defaults": {},
    "namespaces": {
        "scope": {"type": "Namespaces", "namespaces": ["team-a", "team-b"]},
        "rbac": {"siteSecrets": [{"namespace": "sites", "names": ["lumi-tls", "juwels-tls"]}]},
    },
    "bare": {
        "crds": {"enabled": False},
        "rbac": {"create": False, "aggregate": False},
        "serviceAccount": {"create": False, "name": "somebody-elses"},
        "metrics": {"service": {"enabled": False}},
    },
    "tenant": {
        "scope": {"type": "Namespaces", "namespaces": ["team-a"]},
        "crds": {"enabled": False},
        "rbac": {"aggregate": False},
        "sites": {"enabled": False},
        "webhook": {"enabled": False},
    },
    "everything": {
        "fullnameOverride": "federation",
        "commonLabels": {"team": "platform"},
        "commonAnnotations": {"example.com/owner": "platform"},
        "platform": "Kubernetes",
        "scope": {"excludeNamespaces": ["team-x"]},
        "image": {
            "registry": "registry.example",
            "repository": "quay.example/isthmus-operator",
            "digest": DIGEST,
            "pullPolicy": "Always",
        },
        "imagePullSecrets": [{"name": "registry"}],
        "crds": {"keep": False},
        "operator": {
            "cluster": "prod-1",
            "workers": 4,
            "resyncSeconds": 1.5,
            "logFormat": "plain",
            "allowInTemplates": ["host-path", "service-account"],
            "extraArgs": ["--log-level=debug"],
            "extraEnvFrom": [{"configMapRef": {"name": "proxy"}}],
            "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy.example:3128"}],
        },
        "jobDefaults": {
            "all": {
                "metadata": {"annotations": {"example.com/a": "b"}},
                "spec": {"imagePullSecrets": [{"name": "registry"}], "securityContext": {"runAsUser": 2000}},
                "container": {"resources": {"requests": {"cpu": "1"}}},
            },
            "clients": {"spec": {"tolerations": [{"key": "gpu", "operator": "Exists"}]}},
            "service": {"annotations": {"example.com/internal": "true"}},
            "storageClassName": "fast",
        },
        "gateway": {
            "enabled": True,
            "hosts": ["gateway.example", "192.0.2.7"],
            "service": {
                "loadBalancerSourceRanges": ["198.51.100.0/24"],
                "annotations": {"e": "f"},
                "loadBalancerClass": "cloud.example/internal",
                "externalTrafficPolicy": "Local",
                "ipFamilyPolicy": "PreferDualStack",
                "ipFamilies": ["IPv6", "IPv4"],
            },
        },
        "serviceAccount": {"annotations": {"example.com/role": "isthmus"}},
        "podAnnotations": {"example.com/scrape": "true"},
        "podLabels": {"example.com/tier": "control"},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "control", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-cluster-critical",
        "runtimeClassName": "gvisor",
        "deploymentAnnotations": {"reloader.example/auto": "true"},
        "dnsConfig": {"options": [{"name": "ndots", "value": "2"}]},
        "hostAliases": [{"ip": "192.0.2.9", "hostnames": ["login1.example"]}],
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "topology.kubernetes.io/zone",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {"app.kubernetes.io/component": "operator"}},
            }
        ],
        "livenessProbe": {"periodSeconds": 30},
        "readinessProbe": {"failureThreshold": 5},
        "extraObjects": [
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "more"},
                "data": {"n": "{{ .Release.Name }}"},
            },
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: as-text}\ndata: {a: b}\n",
        ],
        "metrics": {
            "port": 9102,
            "service": {"annotations": {"a": "b"}, "labels": {"c": "d"}, "ipFamilyPolicy": "PreferDualStack"},
        },
        "webhook": {
            "service": {"ipFamilies": ["IPv6"]},
            "annotations": {"a.example/b": "c"},
            "objectSelector": {"matchLabels": {"checked": "yes"}},
            "namespaceSelector": {"matchExpressions": [{"key": "checked", "operator": "Exists"}]},
        },
        "health": {"port": 9103},
        "monitoring": {
            "enabled": True,
            "serviceMonitor": {"interval": "30s", "labels": {"release": "prometheus"}, **SCRAPE},
            "podMonitor": {"interval": "1m", "labels": {"release": "prometheus"}, **SCRAPE},
            "bridges": {
                "targets": ["login1.example:9090", "10.0.0.7:9464"],
                "labels": {"release": "prometheus"},
                **SCRAPE,
            },
            "prometheusRule": {
                "namespace": "monitoring",
                "annotations": {"a": "b"},
                "disabled": ["IsthmusQueueWait"],
                "runbookUrl": "https://docs.example/runbooks",
            },
            "dashboards": {"namespace": "grafana", "annotations": {"grafana_folder": "Isthmus"}},
        },
        "networkPolicy": {
            "enabled": True,
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "gatewayFrom": [{"ipBlock": {"cidr": "198.51.100.0/24"}}],
            "egress": [{"ports": [{"port": 443, "protocol": "TCP"}]}, {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
        },
    },
}


@dataclass(frozen=True)
class Helm:
    """One version of Helm, always used offline."""

    program: Path

    def run(self, *arguments: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
        command = [str(self.program), *arguments]
        if values is not None:
            command += ["--values", "-"]
        return subprocess.run(command, input=json.dumps(values or {}), capture_output=True, text=True, check=False)

    def template(self, values: dict[str, Any], *options: str) -> list[Manifest]:
        """Render the chart and return copies of the objects."""
        return copy.deepcopy(_rendered(self, json.dumps(values), options))


@cache
def _rendered(helm: Helm, values: str, options: tuple[str, ...]) -> list[Manifest]:
    # Rendering takes a second, and many tests use the same values.
    arguments = ("template", "isthmus", str(CHART), "--namespace", NAMESPACE, *options)
    result = helm.run(*arguments, values=json.loads(values))
    assert result.returncode == 0, result.stderr
    return [document for document in yaml.load_all(result.stdout, Loader=yaml.CSafeLoader) if document]


def _find(names: tuple[str, ...], major: str) -> Path | None:
    cache = Path(os.environ.get("ISTHMUS_CACHE") or Path.home() / ".cache" / "isthmus")
    found = [shutil.which(name) for name in names]
    candidates = [Path(path) for path in found if path]
    candidates += [path for name in names for path in sorted(cache.glob(f"client-tools-*/{name}"))]
    for candidate in candidates:
        version = subprocess.run([candidate, "version", "--short"], capture_output=True, text=True, check=False).stdout
        if version.startswith(major):
            return candidate
    return None


@pytest.fixture(scope="session", params=["v3", "v4"])
def helm(request: pytest.FixtureRequest, require: Callable[[bool, str], None]) -> Helm:
    """Return Helm, in both supported major versions, one after the other."""
    program = _find(("helm", f"helm{request.param[1]}"), request.param)
    require(program is not None, f"Helm {request.param} is missing: `python -m lab install` fetches it")
    assert program is not None
    return Helm(program)
