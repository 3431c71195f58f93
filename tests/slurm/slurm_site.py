"""A bridge process with a real Slurm, and helpers that inspect both."""

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

# Wrapper of sbatch that injects the fault named in the file `mode`.
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
    """Wait until the condition returns a true value, and return it."""
    deadline = time.monotonic() + seconds
    while True:
        if answer := condition():
            return answer
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


def slurm(*argv: str, check: bool = True) -> str:
    """Run one of Slurm's programs and return its output. Queries are retried if the controller is busy."""
    tries = 5 if argv[0] in ("squeue", "sinfo") else 1
    while True:
        result = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        tries -= 1
        if result.returncode == 0 or not check:
            return result.stdout
        assert tries, f"{argv}: {result.stderr}"
        time.sleep(1)


class Site:
    """A site: one policy, one run directory, and one bridge process at a time."""

    def __init__(self, folder: Path, user: str | None, python: Path, environ: Mapping[str, str]) -> None:
        self.folder = folder
        self._user = user
        # Do not use Popen(user=...), which forks; that is unsafe with gRPC's threads.
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
            # The content of the run directory belongs to the user and may vanish.
            tops = [path for path in self.folder.iterdir() if path.name not in ("run", "users")]
            for path in (self.folder, *tops, *(below for top in tops for below in top.rglob("*"))):
                # An sbatch whose bridge was killed may still rename its output.
                with suppress(FileNotFoundError):
                    shutil.chown(path, self._user, self._user)

    def limit_files(self, most: int) -> None:
        """Set the limit of open files of the next bridge."""
        self._as_user = ["prlimit", f"--nofile={most}:{most}", *self._as_user]

    def let_all_users_inject_faults(self) -> None:
        """Let the wrapper of sbatch run as other users, too."""
        self._state.chmod(0o777)

    def mode(self, mode: str) -> None:
        """Set the fault of the next sbatch."""
        (self._state / "began").unlink(missing_ok=True)
        (self._state / "mode").write_text(mode)

    @property
    def began(self) -> bool:
        """True once the wrapper of sbatch has reached the point of its fault."""
        return (self._state / "began").exists()

    def write_policy(self) -> Path:
        """Write the policy file from the current settings."""
        policy = self.folder / "policy.yaml"
        policy.touch(mode=0o600)
        policy.write_text(yaml.safe_dump(self.settings))
        self.own_files()
        return policy

    def command(self, verb: str, *options: str) -> tuple[int, str]:
        """Run one of the bridge's commands as the bridge's user, and return its exit code and output."""
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
        # A bridge that only dials out is reached through the gateway; the test sets the address.
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
        """Process id of the bridge."""
        assert self._process is not None
        return self._process.pid

    def listens(self) -> list[str]:
        """Return the addresses at which the bridge listens, according to Linux (IPv4 only, as in the tests)."""
        links = [entry.readlink() for entry in Path(f"/proc/{self.pid}/fd").iterdir() if entry.is_symlink()]
        inodes = {str(link)[8:-1] for link in links if str(link).startswith("socket:[")}
        rows = [row.split() for row in Path(f"/proc/{self.pid}/net/tcp").read_text().splitlines()[1:]]
        found = [row[1].split(":") for row in rows if row[3] == "0A" and row[9] in inodes]
        return [f"{socket.inet_ntoa(bytes.fromhex(host)[::-1])}:{int(port, 16)}" for host, port in found]

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end of the bridge."""
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
        """Send SIGTERM and return the exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(120)

    def stub(self, cluster: str = "prod", credentials: Credentials | None = None) -> rpc.BridgeStub:
        """Open a new connection, and return its stub."""
        shown = credentials or self.authority.issue(cluster, DAY, uris=[operator_identity(cluster)])
        self._channels.append(channel(self.address, shown, self.name))
        return rpc.BridgeStub(self._channels[-1])

    def foreign(self) -> rpc.BridgeStub:
        """Open a connection with the right name in a certificate of another CA."""
        forged = Authority.create("another", DAY).issue("prod", DAY, uris=[operator_identity("prod")])
        return self.stub(credentials=Credentials(self.authority.certificate, forged.certificate, forged.key))

    def key(self) -> str:
        """Return a new key. Its arrays are cancelled at the end."""
        self._keys.append(secrets.token_hex(16))
        return self._keys[-1]

    def arrays(self, key: str) -> set[str]:
        """Return the ids of the live arrays with the key's name, as squeue shows them."""
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
            # A program that outlived its bridge may still write to it.
            shutil.rmtree(self.folder, ignore_errors=True)
            return not self.folder.exists()

        for one in self._channels:
            one.close()
        if self._process is not None and self._process.poll() is None:
            self.kill()
        if (log := self.folder / "bridge.log").exists():
            # pytest shows the output if a test fails.
            print(log.read_text()[-400_000:])
        self.end_jobs()
        until(removed, f"{self.folder} is removed")


def spec(**changes: object) -> pb.PoolSpec:
    """Return a request for two short tasks."""
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
    """Call EnsurePool as the operator does, repeated until Slurm has answered."""

    def answered() -> pb.Pool | None:
        pool = stub.EnsurePool(pb.EnsurePoolRequest(key=key, spec=wanted), timeout=60)
        return None if pool.phase == pb.Pool.SUBMITTING else pool

    pool = until(answered, "sbatch has answered, or the bridge has given it up")
    assert isinstance(pool, pb.Pool)
    return pool


def get(stub: rpc.BridgeStub, key: str) -> pb.Pool:
    """Call GetPool."""
    return stub.GetPool(pb.GetPoolRequest(key=key), timeout=60)


def over(stub: rpc.BridgeStub, key: str, seconds: float = 180.0) -> pb.Pool:
    """Wait for the end of the pool and return it."""

    def finished() -> pb.Pool | None:
        pool = get(stub, key)
        return pool if pool.phase in OVER else None

    pool = until(finished, "the pool is over", seconds)
    assert isinstance(pool, pb.Pool)
    return pool


def running(stub: rpc.BridgeStub, key: str, tasks: int = 2) -> None:
    """Wait until ``tasks`` tasks run."""
    until(lambda: get(stub, key).running == tasks, f"{tasks} tasks run")


def restart_while_submitting(
    site: Site, stub: rpc.BridgeStub, key: str, wanted: pb.PoolSpec, mode: str
) -> rpc.BridgeStub:
    """Kill the bridge while its sbatch runs in that mode, and wait until the next bridge reports the pool running."""
    site.mode(mode)
    threading.Thread(target=ensure_at_dying_bridge, args=(stub, key, wanted), daemon=True).start()
    until(lambda: site.began, "sbatch is at work")
    site.kill()
    site.mode("")
    stub = site.start()
    ensure(stub, key, wanted)
    running(stub, key)
    return stub


def ensure_at_dying_bridge(stub: rpc.BridgeStub, key: str, wanted: pb.PoolSpec) -> None:
    """Call EnsurePool at a bridge that may be killed before it answers."""
    try:
        stub.EnsurePool(pb.EnsurePoolRequest(key=key, spec=wanted), timeout=60)
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED), error


def wait_for_output(stub: rpc.BridgeStub, key: str, index: int, words: str) -> None:
    """Wait for output of the script itself, since Slurm reports a task as running before its script has started."""
    until(lambda: words in tail(stub, key, index), f"task {index} says: {words}")


def tail(stub: rpc.BridgeStub, key: str, index: int, lines: int = 200) -> str:
    """Call TailLog, and return the text."""
    chunks = stub.TailLog(pb.TailLogRequest(key=key, index=index, lines=lines), timeout=60)
    return b"".join(chunk.data for chunk in chunks).decode()
