"""Command line: ``python -m tools.release version | dist | check | publish``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import dist, version


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    options = _parser().parse_args(argv)
    try:
        options.command(options)
    except version.ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


def _version(options: argparse.Namespace) -> None:
    if options.new:
        for name in version.write(options.new):
            print(f"wrote {options.new} into {name}")
        return
    print(version.current())
    for name, found in version.stated():
        if found != version.current():
            raise version.ReleaseError(
                f"{name} says {found}: run `python -m tools.release version {version.current()}`"
            )


def _dist(options: argparse.Namespace) -> None:
    dist.make(options.parts or list(dist.PARTS), options.output)


def _check(options: argparse.Namespace) -> None:
    dist.check(options.output.absolute())


def _publish(options: argparse.Namespace) -> None:
    where = dist.publish(options.output.absolute(), options.registry, options.plain_http)
    print(f"pushed {where}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="release", description="Make a release; see docs/development/releases.md.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("version", help="print the version and check that all files have it, or write a new one")
    one.add_argument("new", nargs="?", metavar="VERSION")
    one.set_defaults(command=_version)
    one = commands.add_parser("dist", help="build the parts of a release")
    one.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(dist.PARTS)}; all if none is named")
    one.add_argument("--output", type=Path, default=Path("dist"), help="default: %(default)s")
    one.set_defaults(command=_dist)
    one = commands.add_parser("check", help="install the wheels into clean virtual environments, and compare versions")
    one.add_argument("--output", type=Path, default=Path("dist"), help="directory of the wheels (default: %(default)s)")
    one.set_defaults(command=_check)
    one = commands.add_parser("publish", help="push the chart to an OCI registry (helm registry login comes first)")
    one.add_argument("registry", metavar="REGISTRY", help="such as oci://registry.example/charts")
    one.add_argument("--output", type=Path, default=Path("dist"), help="directory of the chart (default: %(default)s)")
    one.add_argument("--plain-http", action="store_true", help="the registry has no TLS")
    one.set_defaults(command=_publish)
    return parser


if __name__ == "__main__":
    sys.exit(main())
