"""A real cluster, accessed with kubectl, and the operator in a process of its own."""

import base64
import functools
import http.client
import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import urllib3
import yaml
from kubernetes import client, config

from isthmus_operator.effects.kube import connections
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
IMAGE = "isthmus.lab/busybox:1"
ACCOUNT = "isthmus-operator"
T = TypeVar("T")

# Stand-in for the aggregator. It is ready at once, and ends when a file in its volume says so.
AGGREGATOR = """\
trap 'exit 143' TERM
httpd -p 7443
while true; do
  if [ -e /var/lib/isthmus/complete ]; then
    echo '{"phase":"COMPLETE","completedRounds":3,"totalRounds":3,"best":{"name":"accuracy","value":0.93612,"round":3},
      "model":{"path":"model.safetensors","round":3,"sha256":"ab"}}' >/dev/termination-log
    exit 0
  fi
  if [ -e /var/lib/isthmus/fail ]; then
    echo '{"phase":"FAILED","message":"the models do not fit"}' >/dev/termination-log
    exit 1
  fi
  if [ -e /var/lib/isthmus/crash ]; then rm /var/lib/isthmus/crash; echo 'out of luck' >&2; exit 3; fi
  sleep 0.2
done
"""
# Stand-in for a client. It runs until a file asks it to fail.
CLIENT = """\
trap 'exit 143' TERM
while true; do
  if [ -e /tmp/hoard ]; then exec tail /dev/zero; fi
  if [ -e /tmp/fill ]; then rm /tmp/fill; dd if=/dev/zero of=/tmp/data bs=1M count=8; fi
  if [ -e /tmp/fail ]; then echo 'Traceback (most recent call last):' >&2; echo 'ValueError: no data' >&2; exit 1; fi
  sleep 0.2
done
"""


def eventually(
    check: Callable[[], T],
    what: str,
    seconds: float = 120.0,
    every: float = 0.2,
    show: Callable[[], object] | None = None,
) -> T:
    """Wait until ``check`` returns a true value, and return it.

    On time-out, fail with the last value or the output of ``show``.
    """
    until = time.monotonic() + seconds
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > until:
            raise AssertionError(f"not within {seconds:.0f} s: {what} (last: {show() if show else value!r})")
        time.sleep(every)


def kubectl(*arguments: str, stdin: Any = None, check: bool = True) -> str:
    """Run kubectl and return its output. Without ``check``, the output includes standard error."""
    text = None if stdin is None else json.dumps(stdin)
    done = subprocess.run(["kubectl", *arguments], input=text, capture_output=True, text=True, timeout=300, check=False)
    if check and done.returncode:
        raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stdout}{done.stderr}")
    return done.stdout if check else done.stdout + done.stderr


def remove_site(name: str) -> None:
    """Delete an HPCSite, even if jobs of a test still have pools there."""
    kubectl("delete", "hpcsite", name, "--wait=false", "--ignore-not-found")
    kubectl("patch", "hpcsite", name, "--type=merge", "-p", '{"metadata":{"finalizers":null}}', check=False)


@functools.cache
def _api() -> tuple[str, urllib3.PoolManager]:
    configuration = client.Configuration()
    load: Any = config
    load.load_kube_config(client_configuration=configuration)
    token = configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
    pool = connections(configuration, 4)
    pool.headers = {"Authorization": token} if token else {}
    return configuration.host.rstrip("/"), pool


def read(path: str) -> dict[str, Any]:
    """Return the object or list at an API path; empty if it does not exist.

    Tests poll often, and one kubectl process per poll would be slow. Retries while the API server restarts or is
    overloaded.
    """
    host, pool = _api()
    retries = urllib3.Retry(6, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)
    answer = pool.request("GET", host + path, timeout=30, retries=retries)
    if answer.status == 404:
        return {}
    assert answer.status == 200, answer.data
    return dict(answer.json())


_PLACES = {
    "fj": "/apis/isthmus.dev/v1alpha1/namespaces/{}/federatedjobs",
    "pod": "/api/v1/namespaces/{}/pods",
    "service": "/api/v1/namespaces/{}/services",
    "serviceaccount": "/api/v1/namespaces/{}/serviceaccounts",
    "secret": "/api/v1/namespaces/{}/secrets",
    "configmap": "/api/v1/namespaces/{}/configmaps",
    "persistentvolumeclaim": "/api/v1/namespaces/{}/persistentvolumeclaims",
    "networkpolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "poddisruptionbudget": "/apis/policy/v1beta1/namespaces/{}/poddisruptionbudgets",
    "event": "/api/v1/namespaces/{}/events",
}


def pod_template(container: str, **spec: Any) -> dict[str, Any]:
    """Return a pod template whose pods end quickly when they are stopped."""
    return {"spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": container}], **spec}}


def manifest(name: str = "demo", *, cloud: int = 2, **spec: Any) -> dict[str, Any]:
    """Return a FederatedJob that runs with stand-ins."""
    client = pod_template("client")
    aggregator = pod_template("aggregator")
    aggregator["spec"]["containers"][0]["command"] = ["sh", "-c", AGGREGATOR]
    pools = [{"name": "cloud", "replicas": cloud, "cloud": {"template": client}}] if cloud else []
    return {
        "apiVersion": "isthmus.dev/v1alpha1",
        "kind": "FederatedJob",
        "metadata": {"name": name},
        "spec": {
            "rounds": 3,
            "task": {"image": IMAGE, "command": ["sh", "-c", CLIENT]},
            "aggregator": {"template": aggregator},
            "pools": pools,
            **spec,
        },
    }


@dataclass(frozen=True)
class Namespace:
    """Namespace of a test."""

    name: str

    def kubectl(self, *arguments: str, stdin: Any = None, check: bool = True) -> str:
        return kubectl("-n", self.name, *arguments, stdin=stdin, check=check)

    def apply(self, *objects: dict[str, Any], check: bool = True) -> str:
        return self.kubectl(
            "apply", "-f", "-", stdin={"apiVersion": "v1", "kind": "List", "items": list(objects)}, check=check
        )

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """Return an object; empty if it does not exist."""
        return read(f"{_PLACES[kind]}/{name}".format(self.name))

    def items(self, kind: str, labels: str = "app.kubernetes.io/managed-by=isthmus-operator") -> list[dict[str, Any]]:
        query = urllib.parse.urlencode({"labelSelector": labels})
        return list(read(f"{_PLACES[kind]}?{query}".format(self.name))["items"])

    def names(self, kind: str) -> set[str]:
        """Return the names of the operator's objects of a kind."""
        return {item["metadata"]["name"] for item in self.items(kind)}

    def running(self) -> set[str]:
        """Return the names of the pods that run and are not being deleted."""
        return {
            item["metadata"]["name"]
            for item in self.items("pod")
            if item["status"].get("phase") == "Running" and not item["metadata"].get("deletionTimestamp")
        }

    def status(self, name: str = "demo") -> dict[str, Any]:
        return dict(self.get("fj", name).get("status") or {})

    def condition(self, type_: str, name: str = "demo") -> str:
        """Return a condition as ``Status/Reason``; empty if it is not set."""
        for item in self.status(name).get("conditions") or ():
            if item["type"] == type_:
                return f"{item['status']}/{item['reason']}"
        return ""

    def pool(self, pool: str = "cloud", name: str = "demo") -> dict[str, Any]:
        return next((dict(item) for item in self.status(name).get("pools") or () if item["name"] == pool), {})

    def until(self, type_: str, wanted: str, name: str = "demo", seconds: float = 120.0) -> None:
        """Wait for a condition."""
        eventually(
            lambda: self.condition(type_, name) == wanted,
            f"{name} {type_}={wanted}",
            seconds,
            show=lambda: self.status(name),
        )

    def events(self, reason: str) -> list[str]:
        """Return the messages of events about FederatedJobs."""
        return [
            item["message"]
            for item in self.items("event", "")
            if item["involvedObject"]["kind"] == "FederatedJob" and item["reason"] == reason
        ]

    def touch(self, pod: str, path: str) -> None:
        """Control a stand-in by creating a file in its pod.

        The stand-in may end before kubectl reads the command's exit status (137, for example). So the status is not
        checked; tests wait for the effect.
        """
        print(self.kubectl("exec", pod, "--", "touch", path, check=False))

    def leftovers(self) -> list[str]:
        """Return the operator's remaining objects."""
        kinds = ("pod", "service", "secret", "configmap", "persistentvolumeclaim", "networkpolicy")
        return [f"{kind}/{name}" for kind in kinds for name in self.names(kind)]

    def until_bare(self, seconds: float = 240.0) -> None:
        """Wait until none of the operator's objects is left."""
        eventually(lambda: not self.leftovers(), "nothing is left", seconds, show=self.leftovers)


def documented_rules() -> dict[str, list[dict[str, Any]]]:
    """Return the RBAC rules that docs/operating/operator/install.md lists. The tests run with exactly these."""
    text = (ROOT / "docs" / "operating" / "operator" / "install.md").read_text(encoding="utf-8")
    section = text.split("## RBAC", 1)[1].split("\n## ", 1)[0]
    served, cluster = section.split("Cluster-scoped", 1)
    return {"served": [_rule(row) for row in _rows(served)], "cluster": [_rule(row) for row in _rows(cluster)]}


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _rule(cells: list[str]) -> dict[str, Any]:
    group, resource, verbs = cells[:3]
    named = re.findall(r"`([^`]+)`", resource)
    rule: dict[str, Any] = {
        "apiGroups": ["" if group == "core" else group.strip("`")],
        "resources": [named[0]],
        "verbs": [verb.strip() for verb in verbs.split(",")],
    }
    if "only" in resource:
        rule["resourceNames"] = [named[1]]
    return rule


def grant(namespace: str) -> str:
    """Create a service account with exactly the documented rights.

    Return the name of its ClusterRole and ClusterRoleBinding.
    """
    rules = documented_rules()
    subject = [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": namespace}]
    api = "rbac.authorization.k8s.io"
    cluster_name = f"{ACCOUNT}-{namespace}"
    meta, wide = {"name": ACCOUNT, "namespace": namespace}, {"name": cluster_name}
    ref = {"apiGroup": api, "name": ACCOUNT, "kind": "Role"}
    wide_ref = {"apiGroup": api, "name": cluster_name, "kind": "ClusterRole"}
    objects: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
        {"apiVersion": f"{api}/v1", "kind": "Role", "metadata": meta, "rules": rules["served"]},
        {"apiVersion": f"{api}/v1", "kind": "RoleBinding", "metadata": meta, "subjects": subject, "roleRef": ref},
        {"apiVersion": f"{api}/v1", "kind": "ClusterRole", "metadata": wide, "rules": rules["cluster"]},
        {"apiVersion": f"{api}/v1", "kind": "ClusterRoleBinding", "metadata": wide, "subjects": subject,
         "roleRef": wide_ref},
    ]  # fmt: skip
    kubectl("create", "-f", "-", stdin={"apiVersion": "v1", "kind": "List", "items": objects})
    until_granted(namespace)
    return cluster_name


def until_granted(namespace: str, *, wide: bool = True) -> None:
    """Wait until the API server applies the service account's rights, which takes a moment."""
    account = f"--as=system:serviceaccount:{namespace}:{ACCOUNT}"

    def may(*what: str) -> bool:
        return "yes" in kubectl("auth", "can-i", *what, account, check=False).split()

    eventually(lambda: may("list", "federatedjobs.isthmus.dev", "-n", namespace), "the rights in the namespace hold")
    if wide:
        eventually(lambda: may("list", "hpcsites.isthmus.dev"), "the rights in the cluster hold")


def kubeconfig(namespace: str, path: Path) -> Path:
    """Write a kubeconfig for the service account, and return its path."""
    config = yaml.safe_load(kubectl("config", "view", "--minify", "--raw", "-o", "yaml"))
    token = kubectl("-n", namespace, "create", "token", ACCOUNT, "--duration=1h").strip()
    config["users"] = [{"name": "operator", "user": {"token": token}}]
    config["contexts"] = [
        {"name": "operator", "context": {"cluster": config["clusters"][0]["name"], "user": "operator"}}
    ]
    config["current-context"] = "operator"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@dataclass
class Operator:
    """The operator, serving one namespace with its own service account."""

    namespace: str
    config: Path
    log: Path
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    metrics_port: int = field(default_factory=free_port)
    health_port: int = field(default_factory=free_port)

    def start(self, *options: str) -> None:
        """Start the operator and wait until it is ready."""
        command = [
            sys.executable, "-m", "isthmus_operator", "--namespace", self.namespace, "--resync", "1",
            "--metrics", f"127.0.0.1:{self.metrics_port}", "--health", f"127.0.0.1:{self.health_port}",
            *self.options, *options,
        ]  # fmt: skip
        with self.log.open("ab") as log:
            environment = {"KUBECONFIG": str(self.config), "PATH": "/usr/bin:/bin", "HOME": str(self.log.parent)}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment | self.environment)
        eventually(self.ready, "the operator is ready")

    def ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
        return "alive" in self.ask(self.health_port, "/readyz")

    def metrics(self) -> str:
        return self.ask(self.metrics_port, "/metrics")

    @staticmethod
    def ask(port: int, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
                return str(answer.read().decode())
        except (OSError, http.client.HTTPException):
            return ""

    def kill(self) -> None:
        """Kill the operator as the loss of its node would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(60)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(60)


def tls_secret(name: str, files: dict[str, bytes]) -> dict[str, Any]:
    """Return a Secret with certificates."""
    data = {key: base64.b64encode(value).decode() for key, value in files.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": "kubernetes.io/tls", "data": data}
