"""Real Kubernetes on one machine: starts its daemons in order and waits until a pod can run."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lab.kubernetes import config
from lab.kubernetes.api import Api, ApiError
from lab.kubernetes.certificates import Authority, write_key
from lab.kubernetes.config import CLUSTER_DOMAIN, NODE_NAME
from lab.kubernetes.storage import STORAGE_CLASS
from lab.machine import cgroups
from lab.machine.errors import LabError, say
from lab.machine.network import API_SERVICE_ADDRESS, NODE_ADDRESS, POD_RANGE, SERVICE_RANGE, Network
from lab.machine.paths import Paths
from lab.machine.private_mounts import HOLDER, PrivateMounts
from lab.machine.processes import Supervisor

Argv = Sequence[str | os.PathLike[str]]
DAEMONS = (
    HOLDER,
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "containerd",
    "kubelet",
    "kube-proxy",
    "services",
)
ETCD_URL = "http://127.0.0.1:2379"
API_HOSTS = (
    NODE_ADDRESS,
    API_SERVICE_ADDRESS,
    "127.0.0.1",
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    f"kubernetes.default.svc.{CLUSTER_DOMAIN}",
)


class KubernetesCluster:
    """The cluster of one lab."""

    def __init__(self, paths: Paths, network: Network, supervisor: Supervisor) -> None:
        self._paths = paths
        self._network = network
        self._supervisor = supervisor
        self._mounts = PrivateMounts(paths, network, supervisor)
        self._pki = paths.kubernetes / "pki"

    def start(self, programs: dict[str, Path], archives: Iterable[Path]) -> None:
        """Start everything. Runs inside the lab's network; the directory must not contain Kubernetes files yet."""
        self._paths.kubernetes.mkdir()
        self._paths.volumes.mkdir()
        self._mounts.create()
        self._write_configuration()

        say("kubernetes: starting etcd, the API server and containerd")
        self._start_etcd(programs["etcd"])
        self._start_api_server(programs["kube-apiserver"])
        self._start("containerd", ["/usr/bin/containerd", "--config", self._config("containerd.toml")])
        api = Api(self._paths.kubeconfig)
        self._wait("the API server", api.ready, "etcd", "kube-apiserver")

        say("kubernetes: starting the controllers, the kubelet, DNS and storage")
        self._start_controllers(programs)
        self._wait("containerd", self._paths.containerd_socket.is_socket, "containerd")
        for archive in archives:
            self.load_image(archive)
        self._start_node(programs)
        services: Argv = [sys.executable, "-m", "lab", "services", "--dir", self._paths.root]
        # The private mounts may hide this Python; the process needs only the network.
        command = self._network.enter(services)
        self._supervisor.start("services", command, {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
        api.post("/apis/storage.k8s.io/v1/storageclasses", STORAGE_CLASS)
        self._wait("the node", lambda: _node_ready(api), "containerd", "kubelet", "kube-apiserver")
        # The API server rejects pods until the controllers have created their service account.
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        self._wait("the service account", lambda: _exists(api, account), "kube-controller-manager")

    def restart_api_server(self) -> None:
        """Start the API server with its previous command line and wait until it is ready.

        On a busy machine it may exit while it starts: some of its hooks must finish within 30 s. Then it is
        started again, as systemd or a static pod's kubelet would do. Raises LabError if it is not ready after five
        minutes.
        """
        api = Api(self._paths.kubeconfig)

        def ready() -> bool:
            self._supervisor.again("kube-apiserver")
            return api.ready()

        self._wait("the API server", ready, "etcd")

    def stop(self) -> None:
        """End the daemons. Containers are ended with the lab's namespace and cgroup."""
        self._supervisor.stop(reversed(DAEMONS), grace=3)

    def load_image(self, archive: Path) -> str:
        """Import an image archive; return the names of its images."""
        if not archive.is_file():
            raise LabError(f"{archive} is not a file; give an image archive (docker-archive or OCI tar)")
        # Also unpack the image, so that the first pod does not wait for that.
        result = subprocess.run(
            ["ctr", "--address", self._paths.containerd_socket, "--namespace", "k8s.io", "images", "import", archive],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise LabError(f"containerd refuses {archive}: {result.stderr.strip()}")
        return result.stdout.strip()

    def _start(self, name: str, argv: Argv) -> None:
        self._supervisor.start(name, self._mounts.enter(argv))

    def _wait(self, what: str, ready: Callable[[], bool], *names: str) -> None:
        self._supervisor.wait(what, ready, names, timeout=300)

    def _config(self, name: str) -> Path:
        return self._paths.kubernetes / name

    def _write_configuration(self) -> None:
        authority = Authority(self._pki)
        authority.issue("apiserver", "kube-apiserver", hosts=API_HOSTS)
        authority.issue("apiserver-kubelet-client", "kube-apiserver-kubelet-client", ["system:masters"])
        write_key(self._pki / "service-accounts.key")
        node = f"system:node:{NODE_NAME}"
        users = {
            "admin": authority.issue("admin", "kubernetes-admin", ["system:masters"]),
            "controller-manager": authority.issue("controller-manager", "system:kube-controller-manager"),
            "scheduler": authority.issue("scheduler", "system:kube-scheduler"),
            "proxy": authority.issue("proxy", "system:kube-proxy"),
            "kubelet": authority.issue("kubelet", node, ["system:nodes"], [NODE_NAME, NODE_ADDRESS]),
        }
        for user, pair in users.items():
            target = self._paths.kubeconfig if user == "admin" else self._config(f"{user}.kubeconfig")
            target.touch(mode=0o600)
            target.write_text(config.kubeconfig(authority.certificate, *pair))
        self._config("containerd.toml").write_text(config.containerd(self._paths))
        self._config("cni").mkdir()
        (self._config("cni") / "10-lab.conflist").write_text(config.cni(self._paths))
        kubelet = config.kubelet(self._paths, authority.certificate, *users["kubelet"])
        self._config("kubelet.json").write_text(kubelet)
        config.resolv_conf(self._paths).touch()

    def _start_etcd(self, program: Path) -> None:
        argv: Argv = [
            program,
            f"--data-dir={self._config('etcd')}",
            f"--listen-client-urls={ETCD_URL}",
            f"--advertise-client-urls={ETCD_URL}",
            "--listen-peer-urls=http://127.0.0.1:2380",
            # The lab's data does not have to survive a power failure.
            "--unsafe-no-fsync",
        ]
        self._start("etcd", argv)
        self._wait("etcd", _etcd_healthy, "etcd")

    def _start_api_server(self, program: Path) -> None:
        pki = self._pki
        argv: Argv = [
            program,
            f"--advertise-address={NODE_ADDRESS}",
            f"--etcd-servers={ETCD_URL}",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            f"--client-ca-file={pki}/ca.crt",
            f"--tls-cert-file={pki}/apiserver.crt",
            f"--tls-private-key-file={pki}/apiserver.key",
            f"--kubelet-client-certificate={pki}/apiserver-kubelet-client.crt",
            f"--kubelet-client-key={pki}/apiserver-kubelet-client.key",
            "--kubelet-preferred-address-types=InternalIP",
            f"--service-account-issuer=https://kubernetes.default.svc.{CLUSTER_DOMAIN}",
            f"--service-account-key-file={pki}/service-accounts.key",
            f"--service-account-signing-key-file={pki}/service-accounts.key",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            f"--cert-dir={self._config('apiserver-certs')}",
        ]
        self._start("kube-apiserver", argv)

    def _start_controllers(self, programs: dict[str, Path]) -> None:
        pki = self._pki
        manager: Argv = [
            programs["kube-controller-manager"],
            f"--kubeconfig={self._config('controller-manager.kubeconfig')}",
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
            "--use-service-account-credentials=true",
            # On a busy machine a node's heartbeat is late; do not treat the node as lost.
            "--node-monitor-grace-period=180s",
            f"--root-ca-file={pki}/ca.crt",
            f"--service-account-private-key-file={pki}/service-accounts.key",
            f"--cluster-signing-cert-file={pki}/ca.crt",
            f"--cluster-signing-key-file={pki}/ca.key",
            f"--cert-dir={self._config('controller-manager-certs')}",
        ]
        self._start("kube-controller-manager", manager)
        scheduler: Argv = [
            programs["kube-scheduler"],
            f"--kubeconfig={self._config('scheduler.kubeconfig')}",
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
            f"--cert-dir={self._config('scheduler-certs')}",
        ]
        self._start("kube-scheduler", scheduler)

    def _start_node(self, programs: dict[str, Path]) -> None:
        cgroups.create(self._paths.name)
        kubelet: Argv = [
            programs["kubelet"],
            f"--config={self._config('kubelet.json')}",
            f"--kubeconfig={self._config('kubelet.kubeconfig')}",
            f"--root-dir={self._config('kubelet')}",
            f"--cert-dir={self._config('kubelet-certs')}",
            f"--hostname-override={NODE_NAME}",
            f"--node-ip={NODE_ADDRESS}",
            "--container-runtime=remote",
            f"--container-runtime-endpoint=unix://{self._paths.containerd_socket}",
        ]
        self._start("kubelet", kubelet)
        proxy: Argv = [
            programs["kube-proxy"],
            f"--kubeconfig={self._config('proxy.kubeconfig')}",
            f"--hostname-override={NODE_NAME}",
            "--proxy-mode=iptables",
            f"--cluster-cidr={POD_RANGE}",
            # Connection tracking is a setting of the whole machine; the lab must not change it.
            "--conntrack-max-per-core=0",
            "--conntrack-tcp-timeout-established=0",
            "--conntrack-tcp-timeout-close-wait=0",
            "--oom-score-adj=0",
        ]
        self._start("kube-proxy", proxy)


def _etcd_healthy() -> bool:
    try:
        with urllib.request.urlopen(f"{ETCD_URL}/health", timeout=10) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except OSError:
        return False


def _exists(api: Api, path: str) -> bool:
    try:
        api.get(path)
    except ApiError as error:
        if error.status == 404:
            return False
        raise
    return True


def _node_ready(api: Api) -> bool:
    for node in api.get("/api/v1/nodes")["items"]:
        conditions = {entry["type"]: entry["status"] for entry in node.get("status", {}).get("conditions", ())}
        # The taint remains briefly after the condition changes and prevents scheduling.
        if conditions.get("Ready") == "True" and not node["spec"].get("taints"):
            return True
    return False
