"""The ``isthmus`` command. Each verb imports its modules when it runs, so that ``--version`` is fast."""

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from isthmus_contracts.manifests.manifest import FederatedJob, ManifestError, load_code, load_federated_job

from . import __version__

EXIT_BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run the verb, and exit with its status."""
    _prepare_output()
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Arguments after `--` belong to a script.
    end = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:end])
    options.rest = words[end + 1 :]
    if getattr(options, "cluster", False):
        try:
            from .cluster.commands import run_verb
        except ImportError:
            _refuse("this command needs more packages: pip install 'isthmus[cluster]'")
        sys.exit(run_verb(options))
    try:
        job = load_federated_job(options.manifest)
    except ManifestError as error:
        _refuse(str(error))
    sys.exit(options.verb(job, options))


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError("must be 0 or more")
    return value


def _prepare_output() -> None:
    """Make standard output and error accept every character, and replace them if they are closed."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed: the next file to be opened would get its descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _parser() -> argparse.ArgumentParser:
    # Installed as kubectl-fj, it is a plugin of kubectl: `kubectl fj status`.
    name = "kubectl fj" if Path(sys.argv[0]).name == "kubectl-fj" else "isthmus"
    parser = argparse.ArgumentParser(prog=name, description="Federated training across Kubernetes and Slurm.")
    parser.add_argument("--version", action="version", version=f"isthmus {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    run = verbs.add_parser("run", help="run a FederatedJob on this machine, without a cluster")
    run.add_argument("manifest", type=Path, metavar="JOB.yaml")
    run.add_argument("--dir", type=Path, help="directory for checkpoints, logs and the model (default: runs/NAME)")
    existing = run.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from the checkpoints of an earlier run")
    existing.add_argument("--overwrite", action="store_true", help="remove an earlier run and start over")
    run.add_argument("--finish-seconds", type=_seconds, default=600.0, metavar="SECONDS",
                     help="time for scripts to end once training is complete (default: 600)")  # fmt: skip
    run.set_defaults(verb=_run)

    validate = verbs.add_parser("validate", help="check a FederatedJob's manifest")
    validate.add_argument("manifest", type=Path, metavar="JOB.yaml")
    validate.set_defaults(verb=_validate)

    from .cluster.verbs import add_verbs

    add_verbs(verbs)
    return parser


def _run(job: FederatedJob, options: argparse.Namespace) -> int:
    from .local.preflight import CommandError
    from .local.run_directory import RunDirectoryError
    from .local.runner import run_job
    from .local.view import make_view

    try:
        code = load_code(options.manifest, job)
    except ManifestError as error:
        _refuse(str(error))

    root = options.dir or Path("runs") / job.name
    again = ["isthmus", "run", str(options.manifest), *(["--dir", str(options.dir)] if options.dir else []), "--resume"]
    view = make_view(job.spec.rounds)
    try:
        return run_job(
            job, root, view, manifest=options.manifest, code=code, resume=options.resume, overwrite=options.overwrite,
            again=shlex.join(again), finish_seconds=options.finish_seconds,
        )  # fmt: skip
    except (RunDirectoryError, CommandError) as error:
        problem = str(error)
    finally:
        view.close()
    _refuse(problem)


def _validate(job: FederatedJob, options: argparse.Namespace) -> int:
    spec = job.spec
    size = f"{spec.rounds} rounds, {spec.total_clients} clients in {len(spec.pools)} pool(s)"
    print(f"{options.manifest}: FederatedJob {job.name} is valid: {size}")
    if (secure := spec.privacy.secure_aggregation) is not None:
        for line in secure.summary(spec.cohort):
            print(f"secure aggregation: {line}")
    return 0


def _refuse(problem: str) -> NoReturn:
    print(f"isthmus: {problem}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)
