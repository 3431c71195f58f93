"""The configuration files of Kubernetes' parts, as text."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from lab.machine.network import NODE_ADDRESS, POD_RANGE
from lab.machine.paths import Paths
from lab.software.images import PAUSE

NODE_NAME = "lab"
CLUSTER_DOMAIN = "cluster.local"
API_URL = f"https://{NODE_ADDRESS}:6443"
CNI_PROGRAMS = Path("/usr/lib/cni")


def kubeconfig(authority: Path, certificate: Path, key: Path) -> str:
    """Return a self-contained kubeconfig (JSON, which is valid YAML)."""

    def encoded(path: Path) -> str:
        return base64.b64encode(path.read_bytes()).decode()

    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "lab",
        "clusters": [
            {"name": "lab", "cluster": {"server": API_URL, "certificate-authority-data": encoded(authority)}},
        ],
        "users": [
            {"name": "lab", "user": {"client-certificate-data": encoded(certificate), "client-key-data": encoded(key)}},
        ],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
    }
    return json.dumps(document, indent=1) + "\n"


def containerd(paths: Paths) -> str:
    """Return containerd's config.toml, with its own root, state and socket, and the lab's CNI configuration."""
    own = paths.kubernetes
    return f"""\
version = 2
root = "{own}/containerd"
state = "{own}/containerd-state"

[grpc]
  address = "{paths.containerd_socket}"

[plugins."io.containerd.internal.v1.opt"]
  path = "{own}/containerd-opt"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  # Without CAP_SYS_RESOURCE (a container, a restricted VM) no process may lower its own OOM score.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_PROGRAMS}"
    conf_dir = "{own}/cni"
"""


def cni(paths: Paths) -> str:
    """Return the CNI configuration of the pods' network.

    Point-to-point links, not a bridge: traffic between pods then passes the node's rules both ways, as Services need.
    """
    document = {
        "cniVersion": "0.4.0",
        "name": "lab",
        "plugins": [
            {
                "type": "ptp",
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": POD_RANGE}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                    "dataDir": f"{paths.kubernetes}/cni-addresses",
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }
    return json.dumps(document, indent=1) + "\n"


def kubelet(paths: Paths, authority: Path, certificate: Path, key: Path) -> str:
    document: dict[str, Any] = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": NODE_ADDRESS,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(authority)},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(certificate),
        "tlsPrivateKeyFile": str(key),
        "cgroupDriver": "cgroupfs",
        # The lab has its own cgroup: `down` finds the pods' processes in it and removes it.
        "cgroupRoot": f"/{paths.name}",
        "clusterDNS": [NODE_ADDRESS],
        "clusterDomain": CLUSTER_DOMAIN,
        "resolvConf": str(resolv_conf(paths)),
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "maxPods": 250,
        "nodeStatusUpdateFrequency": "2s",
        "serializeImagePulls": False,
        # Preloaded images cannot be pulled again: never collect them, and never evict on a developer's full disk.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "registryPullQPS": 0,
        "eventRecordQPS": 0,
    }
    return json.dumps(document, indent=1) + "\n"


def resolv_conf(paths: Paths) -> Path:
    """Return the empty resolv.conf of pods with dnsPolicy Default: they cannot reach the host's resolver."""
    return paths.kubernetes / "resolv.conf"
