"""The site admin's tutorial, followed as root, and then a job that tries to change the bridge that submitted it."""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import isthmus_bridge
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb import bridge_pb2_grpc as rpc
from isthmus_contracts.wire.pki import Credentials
from isthmus_contracts.wire.transport import channel
from tests.support.site_admin import BRIDGE, JOBS, PAGE, Installation, installed, remove

from .local_users import as_user
from .slurm_site import ensure, over, slurm, spec, tail, until

if TYPE_CHECKING:
    from lab import Lab

KEY = "5117e0ad" * 4
# Each successful attempt prints a line. The last line shows that all attempts were made.
ATTACK = """
try() { name=$1; shift; if "$@" >/dev/null 2>&1 </dev/null; then echo "DONE: $name"; fi; }
try 'read the key' cat {etc}/tls/tls.key
try 'change the policy' sh -c 'echo >>{etc}/policy.yaml'
try 'replace the policy' mv {etc} {etc}.old
try 'read the policy' cat {etc}/policy.yaml
try 'read the journal' cat {var}/journal.db
try 'change the journal' sh -c 'echo >>{var}/journal.db'
try 'put a file beside the journal' touch {var}/x
try 'change the code' sh -c 'echo >>{code}'
try 'add code' touch {code}.py
try 'become the bridge' sudo -n -u {bridge} true
try 'become root' sudo -n true
try 'widen the sudo rule' sh -c 'echo >>{sudoers}'
try 'log in as the bridge' sh -c 'mkdir -p ~{bridge}/.ssh && echo key >>~{bridge}/.ssh/authorized_keys'
try 'end the bridge' kill -0 {pid}
try 'read its memory' head -c1 /proc/{pid}/environ
sbatch --partition=urgent --output=/dev/null --wrap='sleep 300' >/dev/null && echo 'Slurm let it submit'
echo "tried as $(id -un)"
"""


@pytest.fixture
def site(lab: "Lab", require: Callable[[bool, str], None]) -> Iterator[Installation]:
    require(shutil.which("sudo") is not None, "install Debian's package sudo")
    root = Path(tempfile.mkdtemp(prefix="site-admin-", dir=lab.home.parent))
    root.chmod(0o755)
    instead = {"venv: /appl/isthmus/venv": "venv: /usr"}
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    try:
        with installed(root, lab.user_python(), lab.slurm_conf, "127.0.0.1", (free(), free()), instead,
                       environment=environment) as made:  # fmt: skip
            try:
                yield made
            finally:
                slurm("scancel", f"--user={JOBS}", check=False)
                until(lambda: not slurm("squeue", "-h", f"--user={JOBS}"), "the jobs are gone")
    finally:
        remove(root)


def free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def connected(site: Installation) -> rpc.BridgeStub:
    opened = channel(f"{site.host}:{site.port}", Credentials.read(site.operator), site.host)
    return rpc.BridgeStub(opened)


def digests(site: Installation) -> dict[Path, str]:
    files = [*site.configuration.rglob("*"), site.sudoers, site.root / "var/lib/isthmus-bridge"]
    return {path: hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest() for path in files}


def bridge_process(site: Installation) -> int:
    """Return the process id of the bridge itself, not of the sudo that started it."""
    policy = f"{site.configuration}/policy.yaml"
    found = subprocess.run(["pgrep", "-u", BRIDGE, "-f", f"serve --policy {policy}"], capture_output=True, text=True,
                           check=False)  # fmt: skip
    return int(found.stdout.split()[0])


def test_the_tutorial_and_a_job_that_tries_to_change_the_bridge(site: Installation) -> None:
    site.follow()
    said = "\n".join(site.walk.said)
    assert "no problems found" in said and "PROBLEM" not in said, said
    assert "warning: " not in said, said
    assert f"local user {JOBS}: the bridge can submit and cancel as that user" in said
    log = site.walk.directory / "background.log"
    until(lambda: '"message": "serving"' in log.read_text(), "the bridge serves", 60)
    until(lambda: 'isthmus_bridge_slurm_up{site="lumi"} 1.0' in site.look(), "Slurm answers", 60)

    pid, before = bridge_process(site), digests(site)
    code = Path(isthmus_bridge.__file__)
    attack = ATTACK
    for name, value in {
        "etc": site.configuration, "var": site.root / "var/lib/isthmus-bridge", "code": code, "sudoers": site.sudoers,
        "bridge": BRIDGE, "pid": pid,
    }.items():  # fmt: skip
        attack = attack.replace(f"{{{name}}}", str(value))
    stub = connected(site)
    wanted = spec(command=["sh", "-c", attack], environment="isthmus", replicas=1, first_client=0, total_clients=1)
    pool = ensure(stub, KEY, wanted)
    assert over(stub, KEY).phase == pb.Pool.SUCCEEDED, pool
    assert tail(stub, KEY, 0).splitlines() == ["Slurm let it submit", f"tried as {JOBS}"]
    assert digests(site) == before

    # A job submitted by a job cannot be prevented here (only Slurm can), but it is reported.
    counted = f'isthmus_bridge_jobs_without_pool{{site="lumi",user="{JOBS}"}} 1.0'
    until(lambda: counted in site.look(), "the job that a job has submitted is counted", 60)
    site.walk.follow(PAGE, lambda step: " doctor " in step.command)
    assert f"queue: 1 jobs of the local user {JOBS} belong to no pool" in site.walk.said[-1]

    # The same attempts succeed as the bridge's own user, except where files belong to root.
    os.kill(pid, 0)
    attack = attack.replace("sbatch ", "true ")
    allowed = as_user(BRIDGE, "sh", "-c", attack.replace(f"kill -0 {pid}", "true")).stdout.splitlines()
    assert "DONE: read the journal" in allowed and "DONE: read its memory" in allowed
    assert not {"DONE: change the policy", "DONE: change the code", "DONE: become root"} & set(allowed)

    # A change by the admin takes effect immediately.
    policy = site.configuration / "policy.yaml"
    policy.write_text(policy.read_text().replace("replicas: 8", "replicas: 1"))
    os.kill(pid, signal.SIGHUP)
    until(lambda: "was reloaded" in log.read_text(), "the bridge has read it")
