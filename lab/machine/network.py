"""Network of the lab: one namespace with one address and no route out; the host's namespace is not changed."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lab.machine.errors import LabError

NODE_ADDRESS = "10.250.0.1"
SERVICE_RANGE = "10.96.0.0/16"
API_SERVICE_ADDRESS = "10.96.0.1"
POD_RANGE = "10.244.0.0/16"

NETNS_DIRECTORY = Path("/run/netns")
CLONE_NEWNET = 0x40000000


class Network:
    """One named network namespace."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.handle = NETNS_DIRECTORY / name

    def exists(self) -> bool:
        return self.handle.exists()

    def enter(self, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        """Return the command line that runs argv in the namespace.

        Not `ip netns exec`: that replaces /sys, and with it the cgroup mounts that container runtimes need.
        """
        return ["nsenter", f"--net={self.handle}", "--", *(os.fspath(word) for word in argv)]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Move the calling thread, and the processes it starts, into the namespace within this context."""
        with Path("/proc/thread-self/ns/net").open() as outside, self.handle.open() as inside:
            _setns(inside.fileno())
            try:
                yield
            finally:
                _setns(outside.fileno())

    def create(self) -> None:
        """Create the namespace if it does not exist."""
        if self.exists():
            return
        _ip("netns", "add", self.name)
        inside = ("-n", self.name)
        _ip(*inside, "link", "set", "lo", "up")
        # The node's address must not be loopback. Both ends of the pair stay inside, so there is no route out.
        _ip(*inside, "link", "add", "node0", "type", "veth", "peer", "name", "node1")
        _ip(*inside, "address", "add", f"{NODE_ADDRESS}/24", "dev", "node0")
        _ip(*inside, "link", "set", "node0", "up")
        _ip(*inside, "link", "set", "node1", "up")
        # A packet to a Service needs some route before kube-proxy's rules rewrite it.
        _ip(*inside, "route", "add", SERVICE_RANGE, "dev", "node0", "src", NODE_ADDRESS)
        # Everything else fails at once instead of timing out.
        _ip(*inside, "route", "add", "unreachable", "default")
        self._sysctl("net/ipv4/ip_forward", "1")

    def pids(self) -> list[int]:
        """Return all processes in the namespace, including those that the lab did not start."""
        if not self.exists():
            return []
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(word) for word in listed.stdout.split()]

    def delete(self) -> None:
        if self.exists():
            _ip("netns", "delete", self.name)
        # `ip netns add` mounted the directory for the first namespace; remove that mount with the last one.
        if NETNS_DIRECTORY.is_dir() and not any(NETNS_DIRECTORY.iterdir()):
            subprocess.run(["umount", NETNS_DIRECTORY], capture_output=True, check=False)
            NETNS_DIRECTORY.rmdir()

    def _sysctl(self, key: str, value: str) -> None:
        # /proc/sys/net shows the namespace of the process that opens it.
        command = self.enter(["tee", f"/proc/sys/{key}"])
        subprocess.run(command, input=value, text=True, stdout=subprocess.DEVNULL, check=True)


def _setns(descriptor: int) -> None:
    # os.setns requires Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise LabError(f"cannot enter the lab's network: {os.strerror(ctypes.get_errno())}; the lab needs root")


def _ip(*arguments: str) -> None:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise LabError(
            f"`ip {' '.join(arguments)}` failed: {result.stderr.strip()}; the lab needs root with CAP_NET_ADMIN"
        )
