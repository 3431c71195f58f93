"""A bridge process at a real Slurm, and what a test needs to look at both."""

import datetime as dt
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import yaml

from isthmus_contracts.identities import operator_identity, slurm_job_name
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb import bridge_pb2_grpc as rpc
from isthmus_contracts.wire.pki import Authority, Credentials
from isthmus_contracts.wire.transport import channel

DAY = dt.timedelta(days=1)
OVER = (pb.Pool.SUCCEEDED, pb.Pool.FAILED, pb.Pool.CANCELLED)

# Stands before the real sbatch, and misbehaves as the file `mode` in a folder for that says.
SBATCH = """#!/bin/bash
here={state}
mode=$(cat "$here/mode" 2>/dev/null)
if [ "$mode" = random ]; then
  modes=(slow hang-after hang-before fail-after fail-before "" "" "" "")
  mode=${modes[RANDOM % ${#modes[@]}]}
fi
case $mode in
  slow) : >"$here/began"; sleep 3; exec {sbatch} "$@" ;;
  hang-before) : >"$here/began"; sleep 600 ;;
  hang-after) {sbatch} "$@" >"$here/began.new" && mv "$here/began.new" "$here/began"; sleep 600 ;;
  fail-before) echo "cannot do that today" >&2; exit 1 ;;
  fail-after) {sbatch} "$@" >/dev/null; echo "lost the connection" >&2; exit 1 ;;
  *) exec {sbatch} "$@" ;;
esac
"""


def until(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """Wait until the condition returns a true value, and return that."""
    deadline = time.monotonic() + seconds
    while True:
        if answer := condition():
            return answer
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


def slurm(*argv: str, check: bool = True) -> str:
    """Output of one of Slurm's programs. Those that only ask do so again where a busy controller does not answer."""
    tries = 5 if argv[0] in ("squeue", "sinfo") else 1
    while True:
        result = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        tries -= 1
        if result.returncode == 0 or not check:
            return result.stdout
        assert tries, f"{argv}: {result.stderr}"
        time.sleep(1)


class Site:
    """One policy, one run directory, one bridge process at a time."""

    def __init__(self, folder: Path, user: str | None, python: Path, environ: Mapping[str, str]) -> None:
        self.folder = folder
        self._user = user
        # Not Popen's own way to another user: that forks, which gRPC's threads in this process do not survive.
        self._as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"] if user else []
        self._python = python
        self._environ = dict(environ)
        self._channels: list[grpc.Channel] = []
        self._process: subprocess.Popen[str] | None = None
        self._keys: list[str] = []
        self.address, self.name = "", "localhost"
        self.authority = Authority.create("site", DAY)
        self.authority.issue("bridge", DAY, hosts=["localhost"]).write(folder / "tls")
        self.bin, self._state = folder / "bin", folder / "state"
        self.bin.mkdir()
        self._state.mkdir()
        wrapper = self.bin / "sbatch"
        text = SBATCH.replace("{sbatch}", shutil.which("sbatch") or "sbatch").replace("{state}", str(self._state))
        wrapper.write_text(text)
        wrapper.chmod(0o755)
        self.settings: dict[str, Any] = {
            "site": "test",
            "run_dir": str(folder / "run"),
            "tls_dir": str(folder / "tls"),
            "listen": "127.0.0.1:0",
            "metrics_listen": None,
            "identities": [{"uri": operator_identity("prod")}, {"uri": operator_identity("other")}],
            "partitions": ["main", "debug"],
            "environments": {"plain": {"prefix": ["env"], "env_denied": []}, "system": {"venv": "/usr"}},
            "slurm": {"bin_dir": str(self.bin), "poll_seconds": 0.5, "absence_seconds": 4, "absence_lookups": 3},
        }
        self.own_files()

    def own_files(self) -> None:
        """Give all files to the user who runs the bridge."""
        if self._user is not None:
            # What is in the run directory is the user's own, and comes and goes.
            tops = [path for path in self.folder.iterdir() if path.name not in ("run", "users")]
            for path in (self.folder, *tops, *(below for top in tops for below in top.rglob("*"))):
                # An sbatch whose bridge was killed still renames what it writes.
                with suppress(FileNotFoundError):
                    shutil.chown(path, self._user, self._user)

    def limit_files(self, most: int) -> None:
        """Set the limit of open files of the next bridge."""
        self._as_user = ["prlimit", f"--nofile={most}:{most}", *self._as_user]

    def let_all_misbehave(self) -> None:
        """Let the misbehaving sbatch run as other users, too."""
        self._state.chmod(0o777)

    def mode(self, mode: str) -> None:
        """Set the behaviour of the next sbatch."""
        (self._state / "began").unlink(missing_ok=True)
        (self._state / "mode").write_text(mode)

    @property
    def began(self) -> bool:
        """Return whether the misbehaving sbatch has reached the point where it misbehaves."""
        return (self._state / "began").exists()

    def write_policy(self) -> Path:
        """The policy file, as the settings are now."""
        policy = self.folder / "policy.yaml"
        policy.touch(mode=0o600)
        policy.write_text(yaml.safe_dump(self.settings))
        self.own_files()
        return policy

    def command(self, verb: str, *options: str) -> tuple[int, str]:
        """Exit code and output of one of the bridge's commands, run as the bridge's user."""
        argv = [*self._as_user, str(self._python), "-m", "isthmus_bridge.cli", verb]
        result = subprocess.run(
            [*argv, "--policy", str(self.folder / "policy.yaml"), *options], capture_output=True, text=True, cwd="/",
            env={**os.environ, **self._environ}, timeout=180, check=False,
        )  # fmt: skip
        return result.returncode, result.stdout + result.stderr

    def start(self) -> rpc.BridgeStub:
        """Start the bridge, and return a stub for the operator."""
        policy = self.write_policy()
        log = self.folder / "bridge.log"
        begin = log.stat().st_size if log.exists() else 0
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [*self._as_user, str(self._python), "-m", "isthmus_bridge.cli", "serve", "--policy", str(policy)],
                stderr=errors, text=True, cwd="/", env={**os.environ, **self._environ},
            )  # fmt: skip
        line = until(lambda: self._log_line(log, begin, "serving"), f"the bridge serves; its log: {log}", 180)
        # A bridge that only dials out is reached through the gateway: the test sets where.
        self.address = line["listen"] or self.address
        return self.stub()

    def _log_line(self, log: Path, begin: int, message: str) -> dict[str, Any] | None:
        assert self._process is not None
        text = log.read_bytes()[begin:].decode(errors="replace")
        assert self._process.poll() is None, f"the bridge ended: {text}"
        lines = (json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}"))
        return next((line for line in lines if line["message"].startswith(message)), None)

    @property
    def pid(self) -> int:
        """The bridge's."""
        assert self._process is not None
        return self._process.pid

    def listens(self) -> list[str]:
        """Where it takes TCP connections, as Linux sees it (IPv4 only: the tests use nothing else)."""
        links = [entry.readlink() for entry in Path(f"/proc/{self.pid}/fd").iterdir() if entry.is_symlink()]
        inodes = {str(link)[8:-1] for link in links if str(link).startswith("socket:[")}
        rows = [row.split() for row in Path(f"/proc/{self.pid}/net/tcp").read_text().splitlines()[1:]]
        found = [row[1].split(":") for row in rows if row[3] == "0A" and row[9] in inodes]
        return [f"{socket.inet_ntoa(bytes.fromhex(host)[::-1])}:{int(port, 16)}" for host, port in found]

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(120)

    def reload(self, settings: Mapping[str, Any], message: str) -> None:
        """Replace the policy file and send SIGHUP; wait for the message in the log."""
        assert self._process is not None
        (self.folder / "policy.yaml").write_text(yaml.safe_dump(dict(settings)))
        log = self.folder / "bridge.log"
        begin = log.stat().st_size
        self._process.send_signal(signal.SIGHUP)
        until(lambda: self._log_line(log, begin, message), f"the bridge says: {message}")

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(120)

    def stub(self, cluster: str = "prod", credentials: Credentials | None = None) -> rpc.BridgeStub:
        """A connection of its own."""
        shown = credentials or self.authority.issue(cluster, DAY, uris=[operator_identity(cluster)])
        self._channels.append(channel(self.address, shown, self.name))
        return rpc.BridgeStub(self._channels[-1])

    def foreign(self) -> rpc.BridgeStub:
        """A connection with the right name in a certificate of another authority."""
        forged = Authority.create("another", DAY).issue("prod", DAY, uris=[operator_identity("prod")])
        return self.stub(credentials=Credentials(self.authority.certificate, forged.certificate, forged.key))

    def key(self) -> str:
        """A new key; its arrays are cancelled in the end."""
        self._keys.append(secrets.token_hex(16))
        return self._keys[-1]

    def arrays(self, key: str) -> set[str]:
        """Ids of the living arrays that bear the key's name, from squeue itself."""
        return set(slurm("squeue", "-h", "-r", f"--name={slurm_job_name(key)}", "-o", "%F").split())

    def vanish(self, key: str) -> None:
        """Wait until Slurm has no live array of the key."""
        until(lambda: not self.arrays(key), "the jobs are gone")

    def end_jobs(self) -> None:
        """Cancel the jobs named like the keys' arrays, of all owners."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        for key in self._keys:
            slurm("scancel", f"--name={slurm_job_name(key)}", check=False)
        for key in self._keys:
            self.vanish(key)

    def close(self) -> None:
        """Remove all files."""

        def removed() -> bool:
            # A program that outlived its bridge may still write into it.
            shutil.rmtree(self.folder, ignore_errors=True)
            return not self.folder.exists()

        for one in self._channels:
            one.close()
        if self._process is not None and self._process.poll() is None:
            self.kill()
        if (log := self.folder / "bridge.log").exists():
            # pytest shows it where a test has failed.
            print(log.read_text()[-400_000:])
        self.end_jobs()
        until(removed, f"{self.folder} is removed")


def spec(**changes: object) -> pb.PoolSpec:
    """A request for two short tasks."""
    credentials = Authority.create("job", DAY).issue("client", DAY, uris=["isthmus://job/u/pool/p"])
    fields: dict[str, object] = {
        "job_uid": "6f9619ff-8b86-d011-b42d-00cf4fc964ff", "namespace": "default", "job": "fashion", "pool": "hpc",
        "attempt": 1, "replicas": 2, "first_client": 3, "total_clients": 5, "time_limit_seconds": 600,
        "cpus_per_task": 1, "memory_mib": 50, "environment": "plain", "command": ["sleep", "300"],
        "federation": pb.Federation(
            endpoint="aggregator.example:7443", server_name="x.aggregator.isthmus.dev",
            ca_certificate=credentials.ca, certificate=credentials.certificate, private_key=credentials.key,
        ),
    }  # fmt: skip
    fields.update(changes)
    return pb.PoolSpec(**fields)  # type: ignore[arg-type]


def ensure(stub: rpc.BridgeStub, key: str, wanted: pb.PoolSpec) -> pb.Pool:
    """EnsurePool, as the operator does it: again, where Slurm takes longer to answer than the bridge lets us wait."""

    def answered() -> pb.Pool | None:
        pool = stub.EnsurePool(pb.EnsurePoolRequest(key=key, spec=wanted), timeout=60)
        return None if pool.phase == pb.Pool.SUBMITTING else pool

    pool = until(answered, "sbatch has answered, or the bridge has given it up")
    assert isinstance(pool, pb.Pool)
    return pool


def get(stub: rpc.BridgeStub, key: str) -> pb.Pool:
    """GetPool."""
    return stub.GetPool(pb.GetPoolRequest(key=key), timeout=60)


def over(stub: rpc.BridgeStub, key: str, seconds: float = 180.0) -> pb.Pool:
    """The pool, once it is over."""

    def finished() -> pb.Pool | None:
        pool = get(stub, key)
        return pool if pool.phase in OVER else None

    pool = until(finished, "the pool is over", seconds)
    assert isinstance(pool, pb.Pool)
    return pool


def running(stub: rpc.BridgeStub, key: str, tasks: int = 2) -> None:
    """Wait until ``tasks`` tasks run."""
    until(lambda: get(stub, key).running == tasks, f"{tasks} tasks run")


def started_again_while_submitting(
    site: Site, stub: rpc.BridgeStub, key: str, wanted: pb.PoolSpec, mode: str
) -> rpc.BridgeStub:
    """Kill the bridge while its sbatch runs in that mode, and wait until the next bridge reports the pool running."""
    site.mode(mode)
    threading.Thread(target=ask_one_that_dies, args=(stub, key, wanted), daemon=True).start()
    until(lambda: site.began, "sbatch is at work")
    site.kill()
    site.mode("")
    stub = site.start()
    ensure(stub, key, wanted)
    running(stub, key)
    return stub


def ask_one_that_dies(stub: rpc.BridgeStub, key: str, wanted: pb.PoolSpec) -> None:
    """EnsurePool at a bridge that may be killed before it answers."""
    try:
        stub.EnsurePool(pb.EnsurePoolRequest(key=key, spec=wanted), timeout=60)
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED), error


def wait_for_output(stub: rpc.BridgeStub, key: str, index: int, words: str) -> None:
    """Wait for output of the script itself: Slurm reports a task as running before its script has started."""
    until(lambda: words in tail(stub, key, index), f"task {index} says: {words}")


def tail(stub: rpc.BridgeStub, key: str, index: int, lines: int = 200) -> str:
    """TailLog."""
    chunks = stub.TailLog(pb.TailLogRequest(key=key, index=index, lines=lines), timeout=60)
    return b"".join(chunk.data for chunk in chunks).decode()
