"""The command line of images/build."""

from __future__ import annotations

import argparse
import fcntl
import shlex
import sys
import tempfile
import time
from pathlib import Path

from tools.image_builder import engines, local_base
from tools.image_builder.common import ROOT, BuildError, cache_directory, say
from tools.image_builder.host import Borrowed, borrow
from tools.image_builder.inputs import IMAGES, Image, digest, version

DEFAULT_BASE = "docker.io/library/python:3.11-slim-bookworm"
# Mount points that must exist in a plain directory for runtimes that create none themselves.
MOUNT_POINTS = ("dev", "proc", "sys", "run", "tmp", "mnt", "home", "ch")
MOUNT_FILES = ("etc/hosts", "etc/resolv.conf")
ENVIRONMENT = "PATH=/opt/isthmus/bin:/usr/local/bin:/usr/bin:/bin\nPYTHONUNBUFFERED=1\nPYTHONDONTWRITEBYTECODE=1\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="images/build", description="Build Isthmus' container images. Images that are up to date are skipped."
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=f"{', '.join(IMAGES)}; all if none is named")
    parser.add_argument("--engine", choices=engines.ENGINES, help="default: the first that works")
    parser.add_argument("--repository", default="localhost", help="prefix of /isthmus-IMAGE (default: %(default)s)")
    parser.add_argument("--tag", default=version(), help="default: the project's version, %(default)s")
    base = parser.add_mutually_exclusive_group()
    base.add_argument(
        "--base-image", help=f"a Debian-like image (default: {DEFAULT_BASE}, or a local base if it cannot be pulled)"
    )
    base.add_argument(
        "--local-base", action="store_true", help="build the base with debootstrap (needs root and a Debian mirror)"
    )
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="such as TORCH_BUILD=cu126"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="also write DIR/isthmus-IMAGE.tar (docker-archive)")
    parser.add_argument(
        "--rootfs", type=Path, metavar="DIR", help="also unpack the runtime image into DIR (for ch-run)"
    )
    return parser.parse_args()


def main() -> int:
    options = arguments()
    try:
        with (cache_directory() / ".lock").open("w") as lock, tempfile.TemporaryDirectory() as scratch:
            fcntl.flock(lock, fcntl.LOCK_EX)
            build(options, Path(scratch))
    except BuildError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def build(options: argparse.Namespace, scratch: Path) -> None:
    unknown = [name for name in options.images if name not in IMAGES]
    if unknown:
        raise BuildError(f"no such image: {', '.join(unknown)} (there are {', '.join(IMAGES)})")
    chosen = [IMAGES[name] for name in options.images or IMAGES]
    if options.rootfs and IMAGES["runtime"] not in chosen:
        raise BuildError("--rootfs unpacks the runtime image; name it too, or name no image")
    engine = engines.choose(options.engine)
    build_arguments = dict(word.partition("=")[::2] for word in options.build_arg)
    build_arguments["BASE_IMAGE"] = base_image(engine, options)
    borrowed = borrow(scratch)
    for image in chosen:
        reference = f"{options.repository}/isthmus-{image.name}:{options.tag}"
        inputs = digest(image.files(), build_arguments)
        build_one(engine, image, reference, inputs, build_arguments, borrowed)
        if options.output:
            save(engine, reference, inputs, options.output / f"isthmus-{image.name}.tar")
        if options.rootfs and image.name == "runtime":
            unpack(engine, reference, inputs, options.rootfs)
        print(reference)


def base_image(engine: engines.Engine, options: argparse.Namespace) -> str:
    """Return the base image; if the registry is unreachable, make one with debootstrap."""
    if options.base_image:
        return str(options.base_image)
    if not options.local_base:
        if engine.has(DEFAULT_BASE):
            return DEFAULT_BASE
        # After the first fallback, keep the local base: a warm build must not wait for a registry.
        if not engine.has(local_base.reference()):
            say(f"pulling {DEFAULT_BASE}")
            if engine.pull(DEFAULT_BASE):
                return DEFAULT_BASE
            say("it cannot be pulled; using a base built on this machine")
    return local_base.ensure(engine)


def build_one(
    engine: engines.Engine,
    image: Image,
    reference: str,
    inputs: str,
    build_arguments: dict[str, str],
    borrowed: Borrowed,
) -> None:
    if engine.inputs_of(reference) == inputs:
        say(f"{reference} is up to date")
        return
    log = cache_directory() / f"{image.name}.log"
    started = time.monotonic()
    final, stages = {**build_arguments, "INPUTS": inputs}, {}
    if engine.rereads_stages:
        # The dependencies (a gigabyte in the runtime) are a separate image, tagged with the digest of their inputs.
        packages = f"localhost/isthmus-{image.name}-packages:{digest(image.package_files(), build_arguments)[:16]}"
        if not engine.has(packages):
            say(f"building the dependencies of {reference} with {engine.name}")
            engine.build(image.dockerfile, ROOT, packages, build_arguments, borrowed, log, target="packages")
        stages["packages"] = packages
    say(f"building {reference} with {engine.name}")
    engine.build(image.dockerfile, ROOT, reference, final, borrowed, log, stages=stages)
    say(f"built {reference} in {time.monotonic() - started:.0f} s")


def save(engine: engines.Engine, reference: str, inputs: str, archive: Path) -> None:
    """Write the archive, unless it holds that image already."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    stamp, state = archive.with_suffix(".inputs"), f"{reference} {inputs}\n"
    if archive.is_file() and stamp.is_file() and stamp.read_text() == state:
        return
    partial = archive.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    stamp.unlink(missing_ok=True)
    started = time.monotonic()
    engine.save(reference, partial)
    partial.rename(archive)
    stamp.write_text(state)
    say(f"wrote {archive} ({archive.stat().st_size / 1e6:.0f} MB) in {time.monotonic() - started:.0f} s")


def unpack(engine: engines.Engine, reference: str, inputs: str, directory: Path) -> None:
    """Unpack the image into a plain directory that every user can read and run."""
    directory = directory.absolute()
    stamp, state = directory / "ch" / "inputs", f"{reference} {inputs}\n"
    if stamp.is_file() and stamp.read_text() == state:
        return
    if directory.exists() and any(directory.iterdir()) and not (directory / "ch").is_dir():
        raise BuildError(f"{directory} has other contents, which would be replaced; name an empty directory")
    stamp.unlink(missing_ok=True)
    started = time.monotonic()
    engine.unpack(reference, directory)
    for name in MOUNT_POINTS:
        (directory / name).mkdir(exist_ok=True)
    for name in MOUNT_FILES:
        (directory / name).touch()
    (directory / "ch" / "environment").write_text(ENVIRONMENT)
    directory.chmod(0o755)
    stamp.write_text(state)
    say(f"unpacked {reference} into {shlex.quote(str(directory))} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
