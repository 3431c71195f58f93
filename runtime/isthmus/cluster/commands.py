"""Implementation of the verbs of :mod:`.verbs`."""

import argparse
import sys
import time

from rich.console import Console
from rich.live import Live

from isthmus_contracts.manifests.manifest import ManifestError

from .api import Cluster, ClusterError
from .logs import logs
from .model import get_model
from .submit import documents, dump, next_step
from .tables import has_ended, job_view, jobs_table, sites_table

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2
_REFRESH_SECONDS = 1.0


def run_verb(options: argparse.Namespace) -> int:
    """Run a verb and return its exit code. Errors are printed as one line."""
    try:
        return _VERBS[options.verb](options)
    except ManifestError as error:
        print(f"isthmus: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (ClusterError, OSError) as error:
        print(f"isthmus: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130


def _cluster(options: argparse.Namespace) -> Cluster:
    return Cluster(options.context, options.namespace)


def _submit(options: argparse.Namespace) -> int:
    objects = documents(
        options.script, options.file, options.rest, name=options.name, image=options.image, rounds=options.rounds,
        pools=options.pool, algorithm=options.algorithm, config=options.config, template=options.template,
    )  # fmt: skip
    if options.dry_run:
        print(dump(objects), end="")
        return EXIT_OK
    cluster = _cluster(options)
    files, job = objects
    created = cluster.create(job)
    # The job is created first, so that a name conflict leaves nothing behind. It waits for its files, and owns them.
    owner = {"apiVersion": created["apiVersion"], "kind": created["kind"], "name": created["metadata"]["name"],
             "uid": created["metadata"]["uid"]}  # fmt: skip
    try:
        cluster.create({**files, "metadata": {**files["metadata"], "ownerReferences": [owner]}})
    except ClusterError as error:
        raise ClusterError(f"the job was created, but not its files: {error}") from None
    print(next_step(options.script, job["metadata"]["name"]))
    return EXIT_OK


def _status(options: argparse.Namespace) -> int:
    cluster, console = _cluster(options), Console(highlight=False)
    if options.job is None:
        console.print(jobs_table(cluster.jobs()))
        return EXIT_OK
    job = cluster.job(options.job)
    if options.once or not console.is_terminal:
        console.print(job_view(job))
        return EXIT_OK
    with Live(job_view(job), console=console, refresh_per_second=4) as live:
        while not has_ended(job):
            time.sleep(_REFRESH_SECONDS)
            job = cluster.job(options.job)
            live.update(job_view(job))
    return EXIT_OK


def _logs(options: argparse.Namespace) -> int:
    for chunk in logs(_cluster(options), options.job, options.who, lines=options.tail, follow=options.follow):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
    return EXIT_OK


def _model_get(options: argparse.Namespace) -> int:
    path = get_model(
        _cluster(options), options.job, options.output, lambda text: print(text, file=sys.stderr), best=options.best
    )
    print(path)
    return EXIT_OK


def _sites(options: argparse.Namespace) -> int:
    cluster = _cluster(options)
    Console(highlight=False).print(sites_table(cluster.sites(), cluster.namespace))
    return EXIT_OK


_VERBS = {"submit": _submit, "status": _status, "logs": _logs, "model_get": _model_get, "sites": _sites}
