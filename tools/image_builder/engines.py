"""One small interface to docker, podman and buildah."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.image_builder.common import BuildError, output_of, run, run_logged
from tools.image_builder.host import Borrowed

INPUTS_LABEL = "dev.isthmus.inputs"
# Time of files in layers if SOURCE_DATE_EPOCH is not set, so that equal inputs give equal layers (2024-01-01).
EPOCH = "1704067200"
PULL_TIMEOUT = 300.0
_STEP = re.compile(r"(?:^|\s)STEP (\d+/\d+): (.*)|^#\d+ (\[.*)")


@dataclass
class Engine:
    """A container engine. The options of `build` are mostly the same for all."""

    name: str
    probe: tuple[str, ...]
    build_verb: tuple[str, ...]
    label_format: str
    options: tuple[str, ...] = ()

    @property
    def rereads_stages(self) -> bool:
        """True if the engine reads all files of a stage to look up a copy from it in the cache, as buildah does."""
        return self.name != "docker"

    def runs(self) -> bool:
        return shutil.which(self.name) is not None and output_of(self.probe, timeout=20) is not None

    def inputs_of(self, reference: str) -> str | None:
        """Return the digest of the inputs that an image was built from, or None if the image does not exist."""
        kind = ["inspect", "--type", "image"] if self.name == "buildah" else ["image", "inspect"]
        return output_of([self.name, *kind, "--format", self.label_format, reference])

    def has(self, reference: str) -> bool:
        return self.inputs_of(reference) is not None

    def pull(self, reference: str) -> bool:
        return output_of([self.name, "pull", reference], timeout=PULL_TIMEOUT) is not None

    def build(
        self,
        dockerfile: Path,
        context: Path,
        reference: str,
        arguments: Mapping[str, str],
        borrowed: Borrowed,
        log: Path,
        target: str | None = None,
        stages: Mapping[str, str] | None = None,
    ) -> None:
        """Build up to `target`; `stages` maps stages to images that replace them."""
        command: list[str | Path] = [*self.build_verb, *self.options, "--file", dockerfile, "--tag", reference]
        epoch = os.environ.get("SOURCE_DATE_EPOCH", EPOCH)
        if self.name == "docker":
            command += ["--build-arg", f"SOURCE_DATE_EPOCH={epoch}", "--progress", "plain"]
        else:
            command += ["--timestamp", epoch]
        if target:
            command += ["--target", target]
        for name, image in (stages or {}).items():
            command += ["--build-context", f"{name}=container-image://{image}"]
        for name, value in arguments.items():
            command += ["--build-arg", f"{name}={value}"]
        if borrowed.wheels:
            command += ["--build-context", f"wheels={borrowed.wheels}"]
        for identity, path in (("pip-conf", borrowed.pip_conf), ("ca-bundle", borrowed.ca_bundle)):
            if path:
                command += ["--secret", f"id={identity},src={path}"]
        run_logged([*command, context], log, f"building {reference}", _step)

    def save(self, reference: str, archive: Path) -> None:
        """Write a docker-archive with uncompressed layers."""
        if self.name == "buildah":
            command: list[str | Path] = [
                "buildah",
                "push",
                "--quiet",
                reference,
                f"docker-archive:{archive}:{reference}",
            ]
        elif self.name == "podman":
            command = ["podman", "save", "--quiet", "--format", "docker-archive", "--output", archive, reference]
        else:
            command = ["docker", "save", "--output", archive, reference]
        run(command, f"writing {archive}")

    def unpack(self, reference: str, directory: Path) -> None:
        """Make `directory` equal to the image's file system."""
        if self.name == "buildah":
            self._unpack_mounted(reference, directory)
            return
        # The container only provides its file system and never runs; the command is required by the engine.
        container = run([self.name, "create", reference, "true"], "creating a container")
        archive = directory.with_name(f"{directory.name}.tar.partial")
        try:
            run([self.name, "export", "--output", archive, container], "exporting the file system")
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            run(["tar", "--extract", "--file", archive, "--directory", directory], "unpacking the file system")
        finally:
            archive.unlink(missing_ok=True)
            output_of([self.name, "rm", container])

    def _unpack_mounted(self, reference: str, directory: Path) -> None:
        """Copy only changed files: after a change of code these are few."""
        container = run(["buildah", "from", "--pull-never", reference], "creating a container")
        try:
            mounted = run(["buildah", "mount", container], "mounting the image (buildah needs root for it)")
            if shutil.which("rsync"):
                # Compare contents: all files in the layers have the same time.
                command: list[str | Path] = ["rsync", "-aH", "--numeric-ids", "--checksum", "--delete", "--exclude=/ch"]
                directory.mkdir(parents=True, exist_ok=True)
                run([*command, f"{mounted}/", f"{directory}/"], "copying the file system")
            else:
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir(parents=True)
                run(["cp", "-a", f"{mounted}/.", directory], "copying the file system")
        finally:
            output_of(["buildah", "rm", container])


def _step(line: str) -> str | None:
    match = _STEP.search(line)
    if match is None:
        return None
    if match[3]:
        return match[3][:100]
    # Show the command of a RUN without its mounts.
    return f"[{match[1]}] " + re.sub(r"--mount=\S+\s+", "", match[2])[:100]


# In order of preference.
ENGINES = {
    engine.name: engine
    for engine in (
        Engine("docker", ("docker", "info"), ("docker", "build"), '{{index .Config.Labels "%s"}}' % INPUTS_LABEL),  # noqa: UP031
        Engine(
            "podman",
            ("podman", "info"),
            ("podman", "build"),
            '{{index .Labels "%s"}}' % INPUTS_LABEL,  # noqa: UP031
            ("--layers", "--force-rm", "--format", "docker"),
        ),
        Engine(
            "buildah",
            ("buildah", "info"),
            ("buildah", "bud"),
            '{{index .OCIv1.Config.Labels "%s"}}' % INPUTS_LABEL,  # noqa: UP031
            # chroot isolation needs neither user namespaces nor cgroups, so it also works inside containers.
            ("--layers", "--force-rm", "--format", "docker", "--isolation", "chroot", "--network", "host"),
        ),
    )
}


def choose(wanted: str | None) -> Engine:
    """Return the named engine, or the first one that works on this machine."""
    if wanted is not None:
        if not ENGINES[wanted].runs():
            raise BuildError(f"{wanted} does not work here (tried `{' '.join(ENGINES[wanted].probe)}`)")
        return ENGINES[wanted]
    for engine in ENGINES.values():
        if engine.runs():
            return engine
    raise BuildError("none of docker, podman and buildah works here; on Debian: apt-get install buildah")
