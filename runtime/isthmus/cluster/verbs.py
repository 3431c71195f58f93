"""Arguments of ``submit``, ``status``, ``logs``, ``model get`` and ``sites``, without the imports that they need."""

import argparse
from pathlib import Path
from typing import Any


def add_verbs(verbs: Any) -> None:
    """Add the verbs to the command line."""
    submit = _verb(
        verbs, "submit", "run a script in the cluster and at HPC sites without building an image; -- ARGUMENTS"
    )
    submit.add_argument("script", type=Path, metavar="TRAIN.py")
    submit.add_argument(
        "--file", action="append", type=Path, default=[], help="a file to copy beside the script; repeatable"
    )
    submit.add_argument("--name", help="name of the job (default: derived from the script's)")
    submit.add_argument("--image", default="", help="an image with Python, PyTorch and isthmus")
    submit.add_argument("--rounds", type=int, default=0, help="default: 10, or the template's")
    submit.add_argument("--pool", action="append", default=[], metavar="NAME=CLIENTS[@SITE/ENVIRONMENT]",
                        help="repeatable (default: cloud=2)")  # fmt: skip
    submit.add_argument("--algorithm", default="", help="default: FedAvg, or the template's")
    submit.add_argument("--config", action="append", default=[], metavar="NAME=VALUE", help="repeatable: rnd.config")
    submit.add_argument("--template", type=Path, metavar="JOB.yaml", help="a FederatedJob for all other settings")
    submit.add_argument("--dry-run", action="store_true", help="print the objects instead of creating them")
    submit.set_defaults(verb="submit")

    status = _verb(
        verbs, "status", "show a job's pools, rounds and metrics as they change, or, without a name, all jobs"
    )
    status.add_argument("job", nargs="?")
    status.add_argument("--once", action="store_true", help="show the state once")
    status.set_defaults(verb="status")

    log = _verb(verbs, "logs", "show the log of the aggregator or of a client: a pod's, or a Slurm task's")
    log.add_argument("job")
    log.add_argument("who", nargs="?", default="aggregator", metavar="aggregator|POOL/INDEX")
    log.add_argument("-f", "--follow", action="store_true")
    log.add_argument("--tail", type=int, metavar="LINES")
    log.set_defaults(verb="logs")

    model = verbs.add_parser("model", help="fetch a job's model").add_subparsers(required=True, metavar="COMMAND")
    get = _verb(model, "get", "write the newest global model, or the best one, to a file")
    get.add_argument("job")
    get.add_argument("--best", action="store_true", help="the best model so far by the job's objective.metric")
    get.add_argument("-o", "--output", type=Path)
    get.set_defaults(verb="model_get")

    _verb(verbs, "sites", "list the HPC sites and what they offer").set_defaults(verb="sites")


def _verb(verbs: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    parser.add_argument("-n", "--namespace", help="default: the kubeconfig's")
    parser.add_argument("--context", help="context of the kubeconfig")
    parser.set_defaults(cluster=True)
    return parser
