"""The whole lab: start and stop it, and run commands in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lab import slurm, teardown
from lab.kubernetes import single_node
from lab.machine import user_python, users
from lab.machine.errors import LabError, say
from lab.machine.network import NODE_ADDRESS, Network
from lab.machine.paths import Paths
from lab.machine.processes import Supervisor, resident_mib
from lab.software import cache, client_tools, debian, images, kubernetes_binaries

Argv = Sequence[str | os.PathLike[str]]
KUBERNETES, SLURM = "kubernetes", "slurm"
PARTS = (KUBERNETES, SLURM)
# Not a part of the lab: programs that other tests use.
TOOLS = "tools"
DAEMONS = {KUBERNETES: single_node.DAEMONS, SLURM: slurm.DAEMONS}


class Lab:
    """One lab, identified by its directory. Creating the object starts nothing."""

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.paths = Paths.of(directory)
        self.network = Network(self.paths.name)
        self._supervisor = Supervisor(self.paths.run, self.paths.log)
        self._slurm = slurm.SlurmCluster(self.paths, self.network, self._supervisor)
        self._kubernetes = single_node.KubernetesCluster(self.paths, self.network, self._supervisor)

    # Used by tests.

    @property
    def netns(self) -> str:
        """Name of the network namespace, for `ip netns`."""
        return self.network.name

    @property
    def kubeconfig(self) -> Path:
        """Path of the administrator's kubeconfig."""
        return self.paths.kubeconfig

    @property
    def slurm_conf(self) -> Path:
        return self.paths.slurm_conf

    @property
    def node_address(self) -> str:
        """Address at which pods and jobs reach the API server, NodePorts and every process of the lab."""
        return NODE_ADDRESS

    @property
    def user(self) -> str:
        """Unprivileged user who runs the bridge and owns Slurm jobs."""
        return users.USER

    @property
    def home(self) -> Path:
        """Home of that user, writable for Slurm jobs."""
        return self.paths.home

    def env(self, user: str | None = None) -> dict[str, str]:
        """Return the variables that a command in the lab needs in addition to the caller's environment."""
        state = self.paths.user_state
        variables = {
            "ISTHMUS_LAB": str(self.paths.root),
            "ISTHMUS_LAB_NODE_ADDRESS": NODE_ADDRESS,
            "KUBECONFIG": str(self.kubeconfig),
            "SLURM_CONF": str(self.slurm_conf),
            "ISTHMUS_SLURMRESTD": f"unix:{self.paths.slurmrestd_socket}",
            "PATH": f"{self.paths.bin}:{os.environ.get('PATH', os.defpath)}",
            "KUBECACHEDIR": f"{state}/kubectl",
            "HELM_CACHE_HOME": f"{state}/helm/cache",
            "HELM_CONFIG_HOME": f"{state}/helm/config",
            "HELM_DATA_HOME": f"{state}/helm/data",
        }
        if user:
            home = str(self.paths.home) if user == users.USER else str(Path(f"~{user}").expanduser())
            variables |= {"HOME": home, "USER": user, "LOGNAME": user}
        return variables

    def command(self, argv: Argv, user: str | None = None) -> list[str]:
        """Return the command line that runs argv in the lab's network as a user; it also needs `env()`."""
        words = [os.fspath(word) for word in argv]
        if user:
            # setpriv still has root's rights when it starts a program; through env, the program has the user's.
            words = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--", "env", "--", *words]
        return self.network.enter(words)

    def run(
        self,
        argv: Argv,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = False,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """Call subprocess.run in the lab; `env` adds variables."""
        self.require_up()
        environment = {**os.environ, **self.env(user), **(env or {})}
        return subprocess.run(self.command(argv, user), env=environment, check=check, **options)

    def user_python(self) -> Path:
        """Return a Python with the caller's packages that the lab's user and its jobs can run."""
        self.require_up()
        return user_python.provide(self.paths.user_python, lambda argv: self.command(argv, users.USER))

    def require_up(self) -> None:
        """Raise LabError if commands cannot run in this lab."""
        debian.require_root("entering the lab")
        if not self.network.exists():
            raise LabError(f"no lab runs at {self.paths.root}; start it with `python -m lab up`")

    def running(self, part: str) -> bool:
        """Return True if every daemon of a part runs."""
        return all(self._supervisor.pid(name) is not None for name in DAEMONS[part])

    # The verbs.

    def install(self, parts: Iterable[str] = PARTS, companions: bool = True) -> None:
        """Install packages and all programs that the parts need; quick if nothing is missing.

        Of the tools, an ordinary user and a system other than Debian get those that need no package.
        """
        if list(parts) == [TOOLS]:
            try:
                debian.install_if_allowed(debian.TOOLS)
            finally:  # each comes from a different server
                client_tools.find()
            return
        debian.require_debian(slurm_only=list(parts) == [SLURM])
        wanted = [*debian.BASE]
        if KUBERNETES in parts:
            wanted += debian.KUBERNETES
        if SLURM in parts:
            wanted += debian.SLURM
        if companions:
            wanted += (*debian.TOOLS, *debian.COMPANIONS)
        debian.install(wanted)
        if KUBERNETES in parts:
            images.find()
            client_tools.find()
            kubernetes_binaries.find()

    def up(self, parts: Iterable[str] = PARTS) -> None:
        """Start the parts that do not run, after removing their remains."""
        debian.require_root("the lab")
        chosen = [part for part in PARTS if part in parts]
        self.install(chosen, companions=False)
        began = time.monotonic()
        with cache.exclusive(self.paths.name):
            teardown.require_usable(self.paths)
            self._clear_wreck()
            starting = [part for part in chosen if not self.running(part)]
            if not starting:
                say(f"already up at {self.paths.root}")
                return
            for part in starting:
                self._clear(part)
            self._lay_ground()
            starters = {KUBERNETES: self._start_kubernetes, SLURM: self._start_slurm}
            try:
                _together([starters[part] for part in starting])
            except LabError:
                say("the lab did not start; its logs are kept, and `python -m lab down` removes everything")
                raise
        say(f"up at {self.paths.root} in {time.monotonic() - began:.0f} s")

    def down(self) -> None:
        """Stop everything and remove all files outside the cache."""
        debian.require_root("the lab")
        with cache.exclusive(self.paths.name):
            if not self.paths.root.exists() and not self.network.exists():
                say(f"no lab at {self.paths.root}")
                return
            self._remove()
        say(f"down; removed {self.paths.root}")

    def load_image(self, archive: Path) -> str:
        """Import an image archive into the cluster's containerd; return the names of its images."""
        if not self.running(KUBERNETES):
            raise LabError("Kubernetes does not run; start it with `python -m lab up`")
        return self._kubernetes.load_image(archive)

    def stop_slurm_daemon(self, name: str, kill: bool = False) -> None:
        """Stop one of Slurm's daemons, by its name in `daemons()`, or kill it as a crash would. Jobs continue."""
        self._slurm.stop_daemon(name, kill)

    def start_slurm_daemon(self, name: str) -> None:
        """Start it again; for the controller, wait until it answers."""
        self._slurm.start_daemon(name)

    def kill_daemon(self, name: str) -> None:
        """Kill one of :meth:`daemons` as a crash would, for tests of the effect on others."""
        self._supervisor.kill(name)

    def restart_api_server(self) -> None:
        """Start the killed API server and wait until it is ready. Raises LabError if it does not become ready."""
        self._kubernetes.restart_api_server()

    def daemons(self) -> list[tuple[str, int | None, int]]:
        """Return name, pid (None if it has died) and resident MiB of every daemon that was started."""
        rows = []
        for name in self._supervisor.names():
            pid = self._supervisor.pid(name)
            rows.append((name, pid, resident_mib(pid) if pid else 0))
        return rows

    def _start_kubernetes(self) -> None:
        programs = self._provide({**kubernetes_binaries.find(), **client_tools.find()})
        with self.network.entered():
            self._kubernetes.start(programs, images.find().values())

    def _start_slurm(self) -> None:
        self._slurm.start()

    def _lay_ground(self) -> None:
        """Create the directory, the namespace and the user, which the parts share."""
        root = self.paths.root
        root.mkdir(parents=True, exist_ok=True)
        root.chmod(0o755)
        self.paths.marker.touch()
        for folder in (self.paths.run, self.paths.log, self.paths.bin, self.paths.user_state):
            folder.mkdir(exist_ok=True)
        self.network.create()
        users.ensure(self.paths.home)

    def _provide(self, programs: Mapping[str, Path]) -> dict[str, Path]:
        """Copy programs to where every user can run them: the cache may be in root's home."""
        provided = {}
        for name, source in programs.items():
            if source.is_relative_to("/usr"):
                provided[name] = source
                continue
            target = self.paths.bin / name
            target.unlink(missing_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copy2(source, target)
            provided[name] = target
        return provided

    def _clear_wreck(self) -> None:
        """Remove the remains of a crashed lab or a reboot."""
        alive = any(pid for _, pid, _ in self.daemons())
        if not alive and (self.paths.root.exists() or self.network.exists()):
            say("removing the remains of an earlier lab")
            self._remove()

    def _clear(self, part: str) -> None:
        """Remove a part of which some or all daemons do not run."""
        if part == SLURM:
            self._slurm.stop()
            teardown.end_jobs(self.network)
            shutil.rmtree(self.paths.slurm, ignore_errors=True)
            return
        self._kubernetes.stop()
        teardown.end_containers(self.paths, self.network)
        teardown.unmount(self.paths.root)
        for folder in (self.paths.kubernetes, self.paths.volumes):
            shutil.rmtree(folder, ignore_errors=True)
        self.paths.kubeconfig.unlink(missing_ok=True)
        self.paths.containerd_socket.unlink(missing_ok=True)

    def _remove(self) -> None:
        teardown.require_ours(self.paths)
        teardown.require_outside(self.network)
        self._slurm.stop()
        self._kubernetes.stop()
        teardown.end_everything(self.paths, self.network)
        teardown.remove_cgroup(self.paths.name)
        self.network.delete()
        users.remove(self.paths.name)
        teardown.remove_directory(self.paths)


def _together(starters: Sequence[Callable[[], None]]) -> None:
    """Run starters in parallel; raise the first failure when all have ended."""
    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(starter) for starter in starters]:
            future.result()
