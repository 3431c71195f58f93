"""Container images built without a registry or a base image: the sandbox's pause image and a busybox."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

from lab.machine.errors import LabError
from lab.software import cache, debian

REGISTRY = "isthmus.lab"  # a name only: nothing listens there, and the images are preloaded
PAUSE = f"{REGISTRY}/pause:1"
BUSYBOX = f"{REGISTRY}/busybox:1"
CACHE_KEY = "images-1"

# Process that holds a pod's namespaces: waits for a signal and reaps orphans if the pod shares its process namespace.
PAUSE_SOURCE = """\
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static void leave(int number) { (void)number; _exit(0); }
static void reap(int number) { (void)number; while (waitpid(-1, NULL, WNOHANG) > 0) { } }

int main(void) {
    struct sigaction end = {.sa_handler = leave};
    struct sigaction child = {.sa_handler = reap, .sa_flags = SA_NOCLDSTOP};
    sigaction(SIGINT, &end, NULL);
    sigaction(SIGTERM, &end, NULL);
    sigaction(SIGCHLD, &child, NULL);
    for (;;) pause();
}
"""
APPLETS = ("sh", "cat", "echo", "env", "httpd", "id", "ls", "mkdir", "nslookup", "sleep", "touch", "true", "wget")


def find() -> dict[str, Path]:
    """Return the archives (docker-archive) of the images that every lab has, by reference."""
    folder = cache.folder(CACHE_KEY, _make)
    return {PAUSE: folder / "pause.tar", BUSYBOX: folder / "busybox.tar"}


def _make(target: Path) -> None:
    source, program = target / "pause.c", target / "pause"
    source.write_text(PAUSE_SOURCE)
    compiled = subprocess.run(
        ["gcc", "-Os", "-static", "-s", "-Wall", "-o", program, source], capture_output=True, text=True, check=False
    )
    if compiled.returncode:
        raise LabError(f"gcc cannot build the pause program: {compiled.stderr.strip()}")
    write(target / "pause.tar", PAUSE, {"pause": program.read_bytes()}, {}, ["/pause"])

    # Extracted, not installed: the package conflicts with Debian's ordinary busybox.
    debian.extract("busybox-static", "bin/busybox", target / "busybox")
    links = {f"bin/{applet}": "busybox" for applet in APPLETS}
    write(target / "busybox.tar", BUSYBOX, {"bin/busybox": (target / "busybox").read_bytes()}, links, ["/bin/sh"])


def write(archive: Path, reference: str, files: dict[str, bytes], links: dict[str, str], command: list[str]) -> None:
    """Write a one-layer image of executables and symbolic links."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for folder in ("bin", "etc", "tmp"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            tar.addfile(entry)
        for name, content in files.items():
            _add(tar, name, content, 0o755)
        for name, destination in links.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, destination
            tar.addfile(entry)
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    config = json.dumps(
        {
            "architecture": debian.architecture(),
            "os": "linux",
            "config": {"Cmd": command, "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": [reference], "Layers": [f"{digest}/layer.tar"]}]
    with tarfile.open(archive, "w") as tar:
        _add(tar, config_name, config, 0o644)
        _add(tar, f"{digest}/layer.tar", layer.getvalue(), 0o644)
        _add(tar, "manifest.json", json.dumps(manifest).encode(), 0o644)


def _add(tar: tarfile.TarFile, name: str, content: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))
