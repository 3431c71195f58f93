"""Kubernetes' server programs, built once from Debian's source package.

Debian ships the client only, but its bookworm source package holds every server component, vendored. A folder named by
KUBEBUILDER_ASSETS is used first; what it lacks comes from the build.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from lab.machine.errors import LabError, say
from lab.software import cache, debian

VERSION = "1.20.2"
PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
CACHE_KEY = f"kubernetes-v{VERSION}"

SOURCES_LIST = (
    "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main\n"
)
GO = Path("/usr/lib/go-1.19/bin")
REFLECT2 = Path("/usr/share/gocode/src/github.com/modern-go/reflect2")

# Changes that hollow nodes need, as (file, old, new).
EDITS = (
    # Each node's runtime listens at its own path (in TMPDIR): at a common one, the last node takes over
    # the pods of all others, and kills them because it does not know them.
    ("pkg/kubelet/cri/remote/fake/endpoint.go", "package fake\n", 'package fake\n\nimport "os"\n'),
    (
        "pkg/kubelet/cri/remote/fake/endpoint.go",
        "return defaultUnixEndpoint, nil",
        'return "unix://" + os.TempDir() + "/kubelet_remote.sock", nil',
    ),
    # Pods that start at the same time wrote to one map at the same time, which ends a Go program.
    (
        "pkg/kubelet/container/testing/os.go",
        "func (f *FakeOS) Create(path string) (*os.File, error) {\n",
        "func (f *FakeOS) Create(path string) (*os.File, error) {\n\tcreating.Lock()\n\tdefer creating.Unlock()\n",
    ),
    ("pkg/kubelet/container/testing/os.go", '\t"time"\n)\n', '\t"sync"\n\t"time"\n)\n\nvar creating sync.Mutex\n'),
    # As many requests a second as kubelets are allowed since Kubernetes 1.27: 10 are not enough for a node's pods to
    # start within seconds.
    (
        "cmd/kubemark/hollow-node.go",
        "config.QPS = 10\n\tconfig.Burst = 20\n",
        "config.QPS = 50\n\tconfig.Burst = 100\n",
    ),
)

# The tree is not a git checkout, so the build needs its version as a variable.
VERSION_FILE = f"""\
KUBE_GIT_COMMIT='v{VERSION}'
KUBE_GIT_TREE_STATE='archive'
KUBE_GIT_VERSION='v{VERSION}'
KUBE_GIT_MAJOR='1'
KUBE_GIT_MINOR='20'
"""


def find() -> dict[str, Path]:
    """Return the path of every server program and of etcd; build those missing in KUBEBUILDER_ASSETS and the cache."""
    programs = {"etcd": Path("/usr/bin/etcd"), **_assets()}
    lacking = [name for name in PROGRAMS if name not in programs]
    if lacking:
        built = cache.build(CACHE_KEY, _build)
        programs |= {name: built / name for name in lacking}
    return programs


def _assets() -> dict[str, Path]:
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if not folder:
        return {}
    if not Path(folder).is_dir():
        raise LabError(f"KUBEBUILDER_ASSETS names {folder}, which is not a folder; correct or unset it")
    wanted = ("etcd", *PROGRAMS)
    return {name: Path(folder) / name for name in wanted if os.access(Path(folder) / name, os.X_OK)}


def kubemark() -> Path:
    """Return the program of hollow nodes (real kubelets with a fake runtime); build it on first use."""
    return cache.build(f"kubemark-v{VERSION}-2", lambda target: _build(target, ("kubemark",))) / "kubemark"


def _build(target: Path, programs: tuple[str, ...] = PROGRAMS) -> None:
    debian.install(debian.KUBERNETES_BUILD)
    work = target / "work"
    work.mkdir()
    say(f"fetching the Kubernetes {VERSION} source package (34 MB)")
    source = _fetch(work)
    _patch(source)
    say(f"building {', '.join(programs)}: 5 to 10 minutes on two cores, once")
    began = time.monotonic()
    _make(source, programs)
    for name in programs:
        shutil.move(source / "_output/local/bin/linux" / debian.architecture() / name, target / name)
    shutil.rmtree(work)
    say(f"built Kubernetes in {time.monotonic() - began:.0f} s")


def _fetch(work: Path) -> Path:
    """Fetch and unpack the source with apt's signature checks, but without touching the system's apt lists."""
    (work / "lists/partial").mkdir(parents=True)
    (work / "cache/archives/partial").mkdir(parents=True)
    (work / "sources.list").write_text(SOURCES_LIST)
    options = [
        f"Dir::Etc::sourcelist={work}/sources.list",
        "Dir::Etc::sourceparts=/dev/null",
        f"Dir::State::Lists={work}/lists",
        f"Dir::Cache={work}/cache",
        # The cache may lie in root's home, which apt's own download user cannot enter.
        "APT::Sandbox::User=root",
    ]
    debian.apt(["update"], options, work)
    debian.apt(["source", "--download-only", "kubernetes"], options, work)
    description = next(work.glob("kubernetes_*.dsc"))
    # apt checked the signature of the index that names these files; dpkg's own check wants the maintainer's key.
    _run(["dpkg-source", "--no-check", "--extract", description.name, "kubernetes"], work, dict(os.environ))
    return work / "kubernetes"


def _patch(source: Path) -> None:
    """Replace the vendored reflect2 1.0.1, which crashes when built with Go 1.18 or later, by Debian's 1.0.2.

    Also apply `EDITS`, so that hollow nodes can share a machine.
    """
    vendored = source / "vendor/github.com/modern-go/reflect2"
    shutil.rmtree(vendored)
    shutil.copytree(REFLECT2, vendored, ignore=shutil.ignore_patterns("*_test.go"))
    for name, old, new in EDITS:
        file = source / name
        text = file.read_text()
        if text.count(old) != 1:
            raise LabError(f"{file} does not fit the lab's patch: it lacks {old!r}")
        file.write_text(text.replace(old, new))


def _make(source: Path, programs: tuple[str, ...]) -> None:
    """Run Kubernetes' make: a plain `go build` would lack the generated files."""
    (source / ".go/src/k8s.io").mkdir(parents=True, exist_ok=True)
    link = source / ".go/src/k8s.io/kubernetes"
    if not link.is_symlink():
        link.symlink_to("../../..")
    (source / "version.sh").write_text(VERSION_FILE)
    environment = {
        **os.environ,
        "PATH": f"{GO}:{os.environ['PATH']}",
        "GOPATH": str(source / ".go"),
        "GOCACHE": str(source / ".gocache"),
        "GO111MODULE": "off",
        "GOFLAGS": "",
        "CGO_ENABLED": "0",
        "KUBE_GIT_VERSION_FILE": str(source / "version.sh"),
    }
    _run(["make", "WHAT=" + " ".join(f"cmd/{name}" for name in programs)], source, environment)


def _run(argv: list[str], cwd: Path, environment: dict[str, str]) -> None:
    log = cwd / "lab-build.log"
    with log.open("ab") as output:
        result = subprocess.run(argv, cwd=cwd, env=environment, stdout=output, stderr=output, check=False)
    if result.returncode:
        tail = "\n".join(f"    {line[:300]}" for line in log.read_text(errors="replace").splitlines()[-15:])
        raise LabError(f"`{argv[0]}` failed (exit {result.returncode}) in {cwd}; the end of {log}:\n{tail}")
