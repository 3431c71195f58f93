"""Base image made with debootstrap, for machines that reach a Debian mirror but no image registry."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from tools.image_builder.common import BuildError, cache_directory, output_of, run, run_logged, say
from tools.image_builder.engines import EPOCH, Engine
from tools.image_builder.host import Borrowed

SUITE = "bookworm"
RECIPE = 1  # increase when a change below affects the result
PACKAGES = ("python3", "python3-venv", "ca-certificates")
DEFAULT_MIRROR = "http://deb.debian.org/debian"
SOURCES = f"""\
deb http://deb.debian.org/debian {SUITE} main
deb http://deb.debian.org/debian {SUITE}-updates main
deb http://deb.debian.org/debian-security {SUITE}-security main
"""
DOCKERFILE = 'FROM scratch\nADD base.tar /\nCMD ["/bin/sh"]\n'
# Directories to empty: caches, logs, and documentation except the licences, which must be distributed.
EMPTIED = ("var/cache/apt", "var/lib/apt/lists", "var/log", "usr/share/man", "usr/share/info", "usr/share/locale")
# Files that debootstrap copies from the machine or generates randomly.
NEUTRAL = {
    "etc/resolv.conf": "",
    "etc/hostname": "localhost\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/machine-id": "",
    "etc/apt/sources.list": SOURCES,
}


def reference() -> str:
    """Return the tag, which contains a hash of the recipe: a changed recipe gives a new image."""
    recipe = repr((RECIPE, SUITE, PACKAGES, SOURCES, DOCKERFILE, EMPTIED, NEUTRAL))
    return f"localhost/isthmus-base:{SUITE}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def ensure(engine: Engine) -> str:
    """Return the reference of the base image; build and load it if it is missing."""
    name = reference()
    if engine.has(name):
        return name
    folder = cache_directory() / name.rpartition(":")[2]
    archive = folder / "base.tar"
    if not archive.is_file():
        _make(archive)
    (folder / "Dockerfile").write_text(DOCKERFILE)
    engine.build(folder / "Dockerfile", folder, name, {}, Borrowed(), cache_directory() / "base.log")
    return name


def mirror() -> str:
    """Return the mirror from which this machine's apt gets the suite."""
    configured = os.environ.get("DEBIAN_MIRROR")
    if configured:
        return configured
    listed = output_of(["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)"]) or ""
    for line in listed.splitlines():
        uri, _, rest = line.partition(" ")
        if rest == f"{SUITE} main":
            return uri.rstrip("/")
    return DEFAULT_MIRROR


def _make(archive: Path) -> None:
    if os.geteuid() != 0:
        raise BuildError("making a base image with debootstrap needs root; or name one with --base-image")
    if shutil.which("debootstrap") is None:
        raise BuildError("making a base image needs debootstrap: apt-get install debootstrap")
    source = mirror()
    say(f"making a Debian {SUITE} base from {source} (about a minute, only once)")
    archive.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="isthmus-base-", dir=archive.parent))
    try:
        root = scratch / "root"
        options = ["--variant=minbase", f"--include={','.join(PACKAGES)}"]
        command = ["debootstrap", *options, SUITE, str(root), source]
        run_logged(command, cache_directory() / "debootstrap.log", "debootstrap", _stage)
        _upgrade(root)
        _neutralise(root)
        _pack(root, scratch / "base.tar")
        (scratch / "base.tar").rename(archive)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _stage(line: str) -> str | None:
    stages = (
        "I: Retrieving InRelease",
        "I: Extracting dpkg",
        "I: Installing core",
        "I: Unpacking the base",
        "I: Configuring python3.",
    )
    return line[3:] if line.startswith(stages) else None


def _upgrade(root: Path) -> None:
    """Install security updates if the mirror has them."""
    (root / "etc/apt/sources.list").write_text(SOURCES)
    upgrade = "apt-get -q update && apt-get -q --yes upgrade"
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
    environment |= {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    result = subprocess.run(
        ["chroot", root, "sh", "-c", upgrade], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        say("the base lacks security updates: apt-get cannot reach deb.debian.org in it")


def _neutralise(root: Path) -> None:
    for name in EMPTIED:
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir()
    (root / "var/cache/apt/archives/partial").mkdir(parents=True)
    (root / "var/lib/apt/lists/partial").mkdir(parents=True)
    for entry in (root / "usr/share/doc").rglob("*"):
        if entry.name != "copyright" and not entry.is_dir():
            entry.unlink()
    for name in ("var/cache/ldconfig/aux-cache", "var/cache/debconf/templates.dat-old", "var/lib/dpkg/status-old"):
        (root / name).unlink(missing_ok=True)
    for cached in (*root.glob("usr/lib/python3*"), root / "usr/share"):
        for bytecode in cached.rglob("__pycache__"):
            shutil.rmtree(bytecode)
    compileall = "python3 -m compileall -q --invalidation-mode unchecked-hash /usr/lib/python3.11"
    run(["chroot", root, *compileall.split()], "compiling the standard library")
    for name, content in NEUTRAL.items():
        (root / name).write_text(content)


def _pack(root: Path, archive: Path) -> None:
    """Write a sorted tar without times and device nodes; engines provide /dev."""

    def normal(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if entry.ischr() or entry.isblk() or entry.isfifo():
            return None
        entry.mtime = int(os.environ.get("SOURCE_DATE_EPOCH", EPOCH))
        return entry

    with tarfile.open(archive, "w") as tar:
        tar.add(root, ".", filter=normal)
