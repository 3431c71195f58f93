"""Command line: `python -m lab VERB`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from lab import check
from lab.cluster import PARTS, TOOLS, Lab
from lab.machine.errors import LabError, say
from lab.machine.paths import DEFAULT_DIRECTORY


def main() -> int:
    """Run one verb; print a LabError as one message and return 1."""
    # Other users (Slurm's daemons, jobs) must be able to read the files, whatever the caller's umask.
    os.umask(0o022)
    arguments = _parser().parse_args()
    lab = Lab(arguments.dir)
    try:
        return _perform(arguments, lab)
    except LabError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; `python -m lab down` removes what was started")
        return 130


def _perform(arguments: argparse.Namespace, lab: Lab) -> int:
    parts = [arguments.only] if getattr(arguments, "only", None) else list(PARTS)
    match arguments.verb:
        case "install":
            lab.install(parts, companions=arguments.only is None)
            if arguments.only != TOOLS:  # which prints what is missing
                say("installed")
        case "up":
            lab.up(parts)
        case "down":
            lab.down()
        case "status":
            return _status(lab)
        case "env":
            for key, value in lab.env().items():
                print(f"export {key}={shlex.quote(value)}")
        case "exec":
            _exec(lab, arguments.command, arguments.user)
        case "load-image":
            print(lab.load_image(Path(arguments.file)))
        case "check":
            check.run(lab)
        case "roots":
            from lab.roots import fresh_machine

            users = [arguments.user] if arguments.user else [fresh_machine.USER, fresh_machine.ROOT]
            fresh_machine.try_all(arguments.suites, users, arguments.layers.split(), arguments.all)
            say("all promises hold")
        case "newer-slurm":
            from lab.roots import newer_slurm

            return newer_slurm.run(_words(arguments.command), _handed_on())
        case "services":
            # Only this verb needs dnslib.
            from lab.kubernetes import services

            services.serve(lab.paths)
    return 0


def _status(lab: Lab) -> int:
    rows = lab.daemons()
    for part in PARTS:
        print(f"{part}: {'running' if lab.running(part) else 'not running'}")
    for name, pid, memory in rows:
        print(f"  {name:<24} {f'pid {pid}' if pid else 'ENDED':<12} {memory:>5} MiB")
    print(f"directory: {lab.paths.root}   network namespace: {lab.netns}   node address: {lab.node_address}")
    # As in init scripts: 3 means that it does not run.
    return 0 if rows and all(pid for _, pid, _ in rows) else 3


def _words(command: list[str]) -> list[str]:
    words = command[1:] if command[:1] == ["--"] else command
    if not words:
        raise LabError("this verb needs a command: python -m lab exec -- kubectl get pods")
    return words


def _handed_on() -> dict[str, str]:
    """Return the caller's variables that tests in another root need."""
    return {name: value for name, value in os.environ.items() if name == "ISTHMUS_REQUIRE_ALL"}


def _exec(lab: Lab, command: list[str], user: str | None) -> None:
    """Replace this process with the command."""
    words = _words(command)
    lab.require_up()
    sys.stdout.flush()
    argv = lab.command(words, user)
    os.execvpe(argv[0], argv, {**os.environ, **lab.env(user)})  # noqa: S606


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab", description="Real Kubernetes and real Slurm on one Debian machine."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.add_argument("--dir", help=f"the lab's directory (default {DEFAULT_DIRECTORY}); each has its own lab")
        return added

    for name, text, parts in (
        ("install", "install packages and build or fetch every program, without starting anything", (*PARTS, TOOLS)),
        ("up", "start the lab; a running one is left as it is, a crashed one is cleaned up first", PARTS),
    ):
        verb(name, text).add_argument("--only", choices=parts, help="only this part")
    verb("down", "stop everything and remove all files but the cache")
    verb("status", "show the lab's daemons; exit status 3 if one does not run")
    verb("env", "print the variables of commands in the lab, for a shell to eval")
    run = verb("exec", "run a command in the lab's network with its KUBECONFIG, SLURM_CONF and PATH")
    run.add_argument("--user", help="run it as this user, for instance isthmus (default: root)")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND …")
    verb("load-image", "import an image archive into the cluster").add_argument(
        "file", help="docker-archive or OCI tar"
    )
    verb("check", "smoke-test the running parts: pods, DNS, Services, storage, logs, exec; job arrays and accounting")
    roots = verb("roots", "try `make demo` and tests on fresh machines: in bare roots of Debian suites")
    roots.add_argument("suites", nargs="*", metavar="SUITE", help="default: bookworm trixie forky")
    roots.add_argument("--user", choices=["newcomer", "root"], help="only as an ordinary user, or as root")
    roots.add_argument(
        "--layers",
        default="unit",
        help="the layers of the tests to run (default: unit); with an empty string, only the demo",
    )
    roots.add_argument(
        "--all", action="store_true", help="in Debian 12's root (bookworm), as root, every layer with nothing skipped"
    )
    newer = verb(
        "newer-slurm", "run a command in a lab of Debian forky's Slurm, with pyslurm; built once, which takes minutes"
    )
    newer.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND …")
    verb("services", "serve DNS and volumes inside the lab (started by `up`)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
