"""Mount namespace for Kubernetes' daemons, in which the paths they require belong to the lab.

containerd, the kubelet and CNI write to fixed places (/run, /var/lib/cni, /var/lib/kubelet, /var/log/pods) and the
kubelet sets kernel parameters. Here all of these are the lab's own directories and files, and the mounts of
containers are invisible to the host and disappear with the last process.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from lab.machine.errors import LabError
from lab.machine.network import Network
from lab.machine.paths import Paths
from lab.machine.processes import Supervisor

HOLDER = "mounts"
OVERLAID = ("/run", "/var/lib", "/var/log")
# The kubelet would set these for the whole machine. It sees plain files that already have the required values.
KERNEL_PARAMETERS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


class PrivateMounts:
    """The namespace, held open by a sleeping process."""

    def __init__(self, paths: Paths, network: Network, supervisor: Supervisor) -> None:
        self._paths = paths
        self._network = network
        self._supervisor = supervisor

    def create(self) -> None:
        own = self._paths.kubernetes / "private"
        commands = ["set -e"]
        for covered in OVERLAID:
            replacement = own / covered.strip("/").replace("/", "-")
            replacement.mkdir(parents=True)
            commands.append(f"mount --bind {shlex.quote(str(replacement))} {covered}")
        for parameter, value in KERNEL_PARAMETERS.items():
            replacement = own / parameter.replace("/", ".")
            replacement.write_text(f"{value}\n")
            commands.append(f"mount --bind {shlex.quote(str(replacement))} /proc/sys/{parameter}")
        ready = own / "ready"
        commands += [f"touch {shlex.quote(str(ready))}", "exec sleep infinity"]
        unshare = ["unshare", "--mount", "--propagation", "slave", "--", "sh", "-c", "\n".join(commands)]
        self._supervisor.start(HOLDER, self._network.enter(unshare))
        self._supervisor.wait("the private mounts", ready.exists, [HOLDER], timeout=60)

    def enter(self, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        """Return the command line that runs argv in the lab's network and these mounts."""
        pid = self._supervisor.pid(HOLDER)
        if pid is None:
            raise LabError("the lab's mounts are gone; run `python -m lab up` again")
        return [
            "nsenter",
            f"--net={self._network.handle}",
            f"--mount=/proc/{pid}/ns/mnt",
            "--",
            *(os.fspath(word) for word in argv),
        ]
