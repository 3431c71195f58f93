"""Real Slurm on one machine: munged, slurmctld, slurmrestd and several slurmd, all inside the lab's network."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Sequence

from lab.machine.errors import LabError, say
from lab.machine.network import Network
from lab.machine.paths import Paths
from lab.machine.processes import Supervisor

NODES = ("n1", "n2")
NODE_CPUS = 4
NODE_MEMORY_MIB = 8000  # more than a small machine has: used for scheduling, not enforced
NODE_GPUS = 2  # fake devices, so that requests for GPUs can be scheduled
FIRST_PORT = 17011
SLURM_USER = "slurm"
MUNGE, CONTROLLER, REST = "munged", "slurmctld", "slurmrestd"
# slurmrestd refuses to run as root or as Slurm's own user.
REST_USER, REST_GROUP = "nobody", "nogroup"
REST_PORT = 6820
# Plugins of slurmrestd that need no accounting database. Newer versions have one for all versions of the API.
OLD_REST_PLUGINS, REST_PLUGINS = "v0.0.36,v0.0.37,v0.0.38", "slurmctld"
OLD = 22
DAEMONS = (MUNGE, CONTROLLER, *(f"slurmd-{node}" for node in NODES), REST)


def release() -> int:
    """Return the year of the installed Slurm release."""
    told = subprocess.run(["/usr/sbin/slurmctld", "-V"], capture_output=True, text=True, check=True).stdout
    return int(told.split()[1].partition(".")[0])


class SlurmCluster:
    """Slurm cluster of one lab."""

    def __init__(self, paths: Paths, network: Network, supervisor: Supervisor) -> None:
        self._paths = paths
        self._network = network
        self._supervisor = supervisor
        self._root = paths.slurm
        self._socket = self._root / "munge" / "munge.sock"

    def start(self) -> None:
        """Start everything. The lab's directory must not contain Slurm files yet."""
        say("slurm: starting munged, slurmctld, slurmrestd and two slurmd")
        self._write_configuration()
        self.start_daemon(MUNGE)
        self.start_daemon(CONTROLLER)
        for node in NODES:
            self.start_daemon(f"slurmd-{node}")
        self.start_daemon(REST)
        self._supervisor.wait("the Slurm nodes", self.ready, DAEMONS, timeout=180)

    def start_daemon(self, name: str) -> None:
        """Start one of DAEMONS; wait until munged, the controller and slurmrestd answer."""
        conf = str(self._paths.slurm_conf)
        if name == MUNGE:
            munge = self._root / "munge"
            self._start(
                MUNGE,
                "/usr/sbin/munged",
                "--foreground",
                f"--socket={self._socket}",
                f"--key-file={munge / 'munge.key'}",
                f"--pid-file={munge / 'munged.pid'}",
                f"--log-file={munge / 'munged.log'}",
                f"--seed-file={munge / 'munged.seed'}",
            )
            self._supervisor.wait("munged", self._socket.is_socket, [MUNGE], timeout=60)
        elif name == CONTROLLER:
            self._start(CONTROLLER, "/usr/sbin/slurmctld", "-D", "-f", conf)
            self._supervisor.wait("slurmctld", self._controller_answers, [CONTROLLER], timeout=120)
        elif name == REST:
            user = ("setpriv", f"--reuid={REST_USER}", f"--regid={REST_GROUP}", "--clear-groups", "--")
            # It has no token: each request has its own.
            listen = (f"unix:{self._paths.slurmrestd_socket}", f"127.0.0.1:{REST_PORT}")
            self._paths.slurmrestd_socket.unlink(missing_ok=True)
            plugins = OLD_REST_PLUGINS if release() == OLD else REST_PLUGINS
            options = ("-f", conf, "-a", "rest_auth/jwt", "-s", plugins)
            self._start(REST, *user, "/usr/sbin/slurmrestd", *options, *listen)
            self._supervisor.wait("slurmrestd", self._paths.slurmrestd_socket.is_socket, [REST], timeout=60)
        else:
            self._start(name, "/usr/sbin/slurmd", "-D", "-N", name.removeprefix("slurmd-"), "-f", conf)

    def stop_daemon(self, name: str, kill: bool = False) -> None:
        """Stop one of DAEMONS, or kill it as a crash would. Jobs continue."""
        if kill:
            self._supervisor.kill(name)
        self._supervisor.stop([name])

    def _controller_answers(self) -> bool:
        return self._client("scontrol", "ping").returncode == 0

    def ready(self) -> bool:
        """Return True if every node accepts jobs."""
        sinfo = self._client("sinfo", "--noheader", "--Node", "--format=%N %T")
        states = dict(line.split()[:2] for line in sinfo.stdout.splitlines() if line.strip())
        return sinfo.returncode == 0 and all(states.get(node) in ("idle", "mixed", "allocated") for node in NODES)

    def stop(self) -> None:
        """Cancel every job, so that no slurmstepd outlives its slurmd, then end the daemons."""
        if self._supervisor.pid(CONTROLLER) is not None and self._network.exists():
            queued = self._client("squeue", "--noheader", "--format=%i")
            if queued.stdout.split():
                say("slurm: cancelling all jobs")
                users = set(self._client("squeue", "--noheader", "--format=%u").stdout.split())
                for user in users:
                    self._client("scancel", f"--user={user}", "--signal=KILL", "--full")
                    self._client("scancel", f"--user={user}")
                deadline = time.monotonic() + 60
                while self._client("squeue", "--noheader").stdout.strip() and time.monotonic() < deadline:
                    time.sleep(0.2)
        self._supervisor.stop(reversed(DAEMONS), grace=3)

    def _client(self, *argv: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "SLURM_CONF": str(self._paths.slurm_conf)}
        # A client waits long for a controller that is starting; run a new client instead.
        command = self._network.enter(["timeout", "20", *argv])
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def _start(self, name: str, *argv: str) -> None:
        # Jobs inherit parts of slurmd's environment: start it with a minimal one.
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        if name == REST:
            environment |= {"SLURM_JWT": "daemon", "SLURM_BITSTR_LEN": "0"}
        self._supervisor.start(name, self._network.enter(argv), environment)

    def _write_configuration(self) -> None:
        host = socket.gethostname()
        try:
            socket.gethostbyname(host)
        except OSError as error:
            raise LabError(
                f"this machine's name {host} does not resolve; add `127.0.0.1 {host}` to /etc/hosts"
            ) from error
        munge = self._root / "munge"
        munge.mkdir(parents=True)
        key = munge / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        for folder in ("state", "run", "log"):
            (self._root / folder).mkdir()
            shutil.chown(self._root / folder, SLURM_USER, SLURM_USER)
        for node in NODES:
            (self._root / "spool" / node).mkdir(parents=True)
        token_key = self._root / "jwt.key"
        token_key.touch(mode=0o600)
        token_key.write_bytes(secrets.token_bytes(32))
        shutil.chown(token_key, SLURM_USER, SLURM_USER)
        self._paths.slurmrestd_socket.parent.mkdir()
        shutil.chown(self._paths.slurmrestd_socket.parent, REST_USER, REST_GROUP)
        self._write_gpus()
        self._paths.slurm_conf.write_text(self._slurm_conf(host))
        # Present, so that nothing is read from /etc.
        (self._root / "plugstack.conf").touch()
        # 22.05 does not know this setting and does not need it.
        cgroup = "" if release() == OLD else "CgroupPlugin=disabled\n"
        (self._root / "cgroup.conf").write_text(cgroup)

    def _write_gpus(self) -> None:
        devices = self._root / "dev"
        devices.mkdir()
        for number in range(NODE_GPUS):
            # Slurm requires a device file; this one is a second /dev/null.
            os.mknod(devices / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        line = f"NodeName={','.join(NODES)} Name=gpu File={devices}/gpu[0-{NODE_GPUS - 1}]\n"
        (self._root / "gres.conf").write_text(line)

    def _slurm_conf(self, host: str) -> str:
        root = self._root
        settings: Sequence[str] = (
            "ClusterName=lab",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmUser={SLURM_USER}",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            # A requeued job waits until its old credential expires (default: two minutes).
            f"AuthInfo=socket={self._socket},cred_expire=5",
            "AuthAltTypes=auth/jwt",
            f"AuthAltParameters=jwt_key={root}/jwt.key",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core_Memory",
            # Schedule immediately: tests wait for it.
            "SchedulerParameters=sched_interval=2,bf_interval=3,batch_sched_delay=0,sched_min_interval=0",
            "MpiDefault=none",
            "ReturnToService=2",
            # Jobs in `urgent` preempt those of other partitions, which are requeued.
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "SlurmdParameters=config_overrides",
            f"StateSaveLocation={root}/state",
            f"SlurmdSpoolDir={root}/spool/%n",
            f"SlurmctldPidFile={root}/run/slurmctld.pid",
            f"SlurmdPidFile={root}/run/slurmd-%n.pid",
            f"SlurmctldLogFile={root}/log/slurmctld.log",
            f"SlurmdLogFile={root}/log/slurmd-%n.log",
            f"PlugStackConfig={root}/plugstack.conf",
            "SlurmdTimeout=20",
            "KillWait=3",
            "MaxArraySize=10001",
            "JobAcctGatherType=jobacct_gather/linux",
            "AccountingStorageType=accounting_storage/none",
            # Read by `sacct -c`, which needs no database.
            "JobCompType=jobcomp/filetxt",
            f"JobCompLoc={root}/log/jobcomp.log",
            "DefMemPerCPU=100",
            "GresTypes=gpu",
            "Licenses=scratch:4",
            *(
                f"NodeName={node} Feature=lab,of-{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
                f" CPUs={NODE_CPUS} Sockets=1 CoresPerSocket={NODE_CPUS} ThreadsPerCore=1 RealMemory={NODE_MEMORY_MIB}"
                f" Gres=gpu:{NODE_GPUS}"
                for port, node in enumerate(NODES, FIRST_PORT)
            ),
            f"PartitionName=main Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP",
            f"PartitionName=debug Nodes={NODES[-1]} MaxTime=30 State=UP",
            f"PartitionName=urgent Nodes={','.join(NODES)} MaxTime=30 State=UP PriorityTier=10",
        )
        return "\n".join(settings) + "\n"
