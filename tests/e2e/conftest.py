"""The whole of Isthmus, installed as users do: the chart with Helm, the bridge at a Slurm site, real images."""

import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import Lab

ROOT = Path(__file__).parents[2]
SYSTEM = "isthmus-system"
SITE = "lab"
CLUSTER = "e2e"
BRIDGE_PORT = 7444
REPOSITORY = os.environ.get("ISTHMUS_IMAGE_REPOSITORY", "localhost")


def say(text: str) -> None:
    """Print text that ``make e2e`` shows; other runs show it only for failed tests."""
    print(text, flush=True)


def eventually(what: str, check: Callable[[], Any], seconds: float = 240.0, every: float = 0.3) -> Any:
    """Wait until ``check`` returns a true value, and return it.

    On time-out, fail and name what was awaited.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := check():
            return value
        time.sleep(every)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


def run(*argv: str | Path, check: bool = True, **options: Any) -> str:
    """Run a command and return its output. A failure shows the output."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=1200, check=False, **options)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, argv))}: {done.stdout}{done.stderr}")
    return done.stdout + ("" if check else done.stderr)


def get(kind: str, namespace: str, *selector: str) -> list[dict[str, Any]]:
    """Return the objects of a kind."""
    items = json.loads(run("kubectl", "-n", namespace, "get", kind, "-o", "json", *selector))["items"]
    return list(items)


@dataclass
class Site:
    """Slurm site with its directory and its bridge."""

    lab: Lab
    directory: Path
    rootfs: Path
    bridge: subprocess.Popen[bytes] | None = None
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.directory / "bridge.log"

    def prepare(self) -> None:
        """Create the certificates and the policy, as a site's admin does once."""
        command = [self.lab.user_python(), "-m", "isthmus_bridge.cli"]
        certs = self.directory / "certs"
        self.lab.run([*command, "certs", "--dir", certs, "--host", self.lab.node_address, "--operator", CLUSTER],
                     user=self.lab.user, cwd=self.directory, check=True)  # fmt: skip
        prefix = ["ch-run", "--set-env", "--bind", "{tls_dir}:/mnt", "--bind", "{work_dir}:/media", "--cd", "/media"]
        prefix += [str(self.rootfs), "--"]
        policy = {
            "site": SITE,
            "run_dir": str(self.directory / "run"),
            "tls_dir": str(certs / "server"),
            "listen": f"{self.lab.node_address}:{BRIDGE_PORT}",
            "metrics_listen": "127.0.0.1:9464",
            "identities": [{"uri": f"isthmus://operator/{CLUSTER}"}],
            "partitions": ["main"],
            "environments": {
                "isthmus": {"prefix": prefix, "inside": {"tls_dir": "/mnt", "work_dir": "/media"}},
            },
            "limits": {"replicas": 8, "memory_mib": 4096},
        }
        path = self.directory / "policy.yaml"
        path.write_text(yaml.safe_dump(policy, sort_keys=False))
        say(self.lab.run([*command, "check", "--policy", path], user=self.lab.user, cwd=self.directory, check=True,
                         capture_output=True, text=True).stdout)  # fmt: skip

    def start_bridge(self) -> None:
        """Start the bridge as the unprivileged user who owns the jobs."""
        argv = [self.lab.user_python(), "-m", "isthmus_bridge.cli", "serve", "--policy", self.directory / "policy.yaml"]
        with self.log.open("ab") as log:
            self.bridge = subprocess.Popen(
                self.lab.command([str(part) for part in argv], user=self.lab.user),
                env=self.lab.env(self.lab.user), cwd=self.directory, stdout=log, stderr=log,
            )  # fmt: skip

    @contextmanager
    def demanding(self, privacy: dict[str, Any]) -> Iterator[None]:
        """Reload the policy with this privacy section, and afterwards with the earlier one."""
        path = self.directory / "policy.yaml"
        before = path.read_text()
        try:
            self._reload(yaml.safe_dump({**yaml.safe_load(before), "privacy": privacy}, sort_keys=False))
            yield
        finally:
            self._reload(before)

    def _reload(self, policy: str) -> None:
        assert self.bridge is not None
        (self.directory / "policy.yaml").write_text(policy)

        def reloads() -> int:
            return self.log.read_text().count("the policy was reloaded")

        before = reloads()
        self.bridge.send_signal(signal.SIGHUP)
        eventually("the bridge has reloaded the policy", lambda: reloads() > before, 60)

    def audit(self, *options: str) -> str:
        """Return the output of `isthmus-bridge audit`."""
        command = [self.lab.user_python(), "-m", "isthmus_bridge.cli", "audit"]
        done = self.lab.run([*command, "--policy", self.directory / "policy.yaml", *options], user=self.lab.user,
                            cwd=self.directory, check=True, capture_output=True, text=True)  # fmt: skip
        return str(done.stdout)

    def kill_bridge(self) -> None:
        assert self.bridge is not None
        # exec replaces the lab's command with the bridge, so this ends the bridge itself.
        self.bridge.kill()
        self.bridge.wait()

    def squeue(self) -> list[str]:
        """Return the array tasks that Slurm lists as live."""
        return run("squeue", "--noheader", "--array", "--format=%i %j %T %N").splitlines()


@dataclass
class Platform:
    """Cluster with Isthmus and a site."""

    site: Site | None = None
    namespace: str = "default"

    @property
    def slurm(self) -> Site:
        """The site, in tests that have one."""
        assert self.site is not None
        return self.site

    def manifest(self, name: str, **changes: Any) -> dict[str, Any]:
        """Return examples/digits.yaml with another name and other settings (dotted paths)."""
        job: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "digits.yaml").read_text())
        job["metadata"] = {"name": name, "namespace": self.namespace}
        job["spec"]["task"]["image"] = job["spec"]["task"]["image"].replace("localhost", REPOSITORY)
        for path, value in changes.items():
            target: Any = job["spec"]
            *parents, last = path.split("__")
            for part in parents:
                target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
            target[last] = value
        return job

    def apply(self, manifest: dict[str, Any]) -> None:
        say(run("kubectl", "apply", "-f", "-", input=json.dumps(manifest)).strip())

    def job(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(run("kubectl", "-n", self.namespace, "get", "fj", name, "-o", "json"))
        return found

    def status(self, name: str) -> dict[str, Any]:
        return dict(self.job(name).get("status") or {})

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        conditions = self.status(name).get("conditions", [])
        return next((condition for condition in conditions if condition["type"] == kind), {})

    def completed(self, name: str) -> int:
        return int((self.status(name).get("rounds") or {}).get("completed", 0))

    def wait_for_round(self, name: str, number: int) -> None:
        def reached() -> bool:
            failed = self.condition(name, "Failed")
            assert failed.get("status") != "True", failed
            return self.completed(name) >= number

        eventually(f"{name} has completed {number} rounds", reached, 600)

    def wait_for_completion(self, name: str, seconds: int = 900) -> None:
        say(run("kubectl", "-n", self.namespace, "wait", "--for=condition=Complete", f"fj/{name}",
                f"--timeout={seconds}s").strip())  # fmt: skip

    def pods(self, name: str, role: str) -> list[dict[str, Any]]:
        return get("pods", self.namespace, "-l", f"isthmus.dev/job={name},isthmus.dev/role={role}")

    def leftovers(self, name: str) -> list[str]:
        """Return what remains of a job, in the cluster and in Slurm."""
        left = []
        for kind in ("pods", "services", "secrets", "configmaps", "persistentvolumeclaims"):
            for item in get(kind, self.namespace):
                if item["metadata"]["name"].startswith(f"{name}-"):
                    left.append(f"{kind}/{item['metadata']['name']}")
        return left + (self.site.squeue() if self.site else [])

    def delete(self, name: str) -> None:
        say(run("kubectl", "-n", self.namespace, "delete", "fj", name, "--timeout=300s").strip())
        eventually(f"nothing is left of {name}", lambda: not self.leftovers(name))

    def describe(self, name: str) -> str:
        """Return the job's state for the report of a failed test."""
        parts = [
            run("kubectl", "-n", self.namespace, "get", "fj", name, "-o", "yaml", check=False),
            run("kubectl", "-n", self.namespace, "get", "pods,events", check=False),
            run("kubectl", "-n", SYSTEM, "logs", "deployment/isthmus-operator", "--tail=60", check=False),
            run("kubectl", "-n", self.namespace, "logs", f"{name}-aggregator", "--tail=60", check=False),
            *(("\n".join(self.site.squeue()), run("tail", "-60", self.site.log, check=False)) if self.site else ()),
        ]
        return "\n----\n".join(parts)


@pytest.fixture(scope="session")
def cluster(require: Callable[[bool, str], None]) -> Iterator[Platform]:
    """Install Isthmus with Helm once for all tests, in the lab's cluster or the one that KUBECONFIG names."""
    in_lab = "ISTHMUS_LAB" in os.environ
    require(in_lab or "KUBECONFIG" in os.environ, "no cluster: run `make e2e` as root on Debian, or with KUBECONFIG=…")
    platform = Platform()
    if in_lab:
        images = Path(os.environ.get("ISTHMUS_IMAGES", ""))
        require((images / "rootfs").is_dir(), "no images: run `make e2e`, which builds them")
        lab = Lab()
        for name in ("operator", "runtime"):
            say(f"loaded {lab.load_image(images / f'isthmus-{name}.tar')}")
        directory = Path(lab.home) / f"site-{uuid.uuid4().hex[:6]}"
        directory.mkdir()
        shutil.chown(directory, lab.user)
        # With the CRDs of the Prometheus Operator, the chart creates its monitoring objects.
        run("kubectl", "apply", "-f", ROOT / "tests" / "chart" / "monitoring_crds.yaml")
        platform.site = Site(lab, directory, images / "rootfs")
    try:
        install("Never" if in_lab else "IfNotPresent")
        yield platform
    finally:
        run("helm", "uninstall", "isthmus", "--namespace", SYSTEM, "--wait", check=False)
        run("kubectl", "delete", "namespace", SYSTEM, "--wait=false", check=False)


@pytest.fixture(scope="session")
def platform(cluster: Platform, require: Callable[[bool, str], None]) -> Iterator[Platform]:
    """Connect the cluster to a Slurm site with a running bridge."""
    require(cluster.site is not None, "no Slurm site: only the lab has one")
    site = cluster.slurm
    site.prepare()
    site.start_bridge()
    try:
        connect(site.directory / "certs" / f"operator-{CLUSTER}", f"{site.lab.node_address}:{BRIDGE_PORT}")
        yield cluster
    finally:
        run("kubectl", "delete", "hpcsite", SITE, "--ignore-not-found", "--timeout=120s", check=False)
        site.kill_bridge()


def install(pull_policy: str) -> None:
    """Install the chart, as a platform engineer does."""
    say(
        run("helm", "install", "isthmus", ROOT / "charts" / "isthmus", "--namespace", SYSTEM, "--create-namespace",
            "--set", f"operator.cluster={CLUSTER}", "--set", f"image.pullPolicy={pull_policy}",
            "--set", f"image.repository={REPOSITORY}/isthmus-operator",
            "--set", "operator.resyncSeconds=1", "--set", "monitoring.enabled=true", "--wait", "--timeout", "600s")
    )  # fmt: skip


def connect(credentials: Path, endpoint: str) -> None:
    """Create the site's Secret and HPCSite, as a platform engineer does with the files from the site's admin."""
    run("kubectl", "-n", SYSTEM, "create", "secret", "generic", "hpcsite-lab",
        *(f"--from-file={name}={credentials / name}" for name in ("ca.crt", "tls.crt", "tls.key")))  # fmt: skip
    site = yaml.safe_load((ROOT / "examples" / "hpcsite.yaml").read_text())
    site["spec"]["endpoint"] = endpoint
    run("kubectl", "apply", "-f", "-", input=json.dumps(site))
    say(run("kubectl", "wait", "--for=condition=Reachable", f"hpcsite/{SITE}", "--timeout=240s").strip())


@pytest.fixture
def job(cluster: Platform, request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield a name for the test's FederatedJob, which is deleted afterwards.

    If the test fails, print the job's state.
    """
    name = f"e2e-{uuid.uuid4().hex[:5]}"
    failures = request.session.testsfailed
    yield name
    if request.session.testsfailed > failures:
        print(cluster.describe(name))
    run("kubectl", "-n", cluster.namespace, "delete", "fj", name, "--ignore-not-found", "--timeout=120s", check=False)
    if cluster.site is not None:
        # The next test polls the same queue, where a cancelled task stays for a moment.
        eventually("Slurm has nothing of it", lambda: not cluster.slurm.squeue())
