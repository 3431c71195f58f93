"""``isthmus-operator``: the command line."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

# Before gRPC is loaded: failures are reported by status codes. gRPC's own log lines about each attempt are noise, which
# callers of the gateway could cause at will.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import kopf

from isthmus_contracts.process.log_limit import limit_root
from isthmus_contracts.wire.addresses import split

from . import __version__
from .app import App
from .effects.signing_root import DEFAULT_NAME as SIGNING_ROOT
from .handlers import build_registry
from .render.defaults import NONE
from .render.defaults_file import DefaultsError, load
from .render.restrict import ALLOWANCES
from .settings import Settings

_YES = ("1", "true")
_LEVELS = ("debug", "info", "warning", "error")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the operator until it is stopped."""
    settings = parse(sys.argv[1:] if arguments is None else arguments)
    _log(settings)
    everywhere = not settings.namespaces
    app = App(settings)
    kopf.run(
        registry=build_registry(app),
        ready_flag=app.health.ready,
        clusterwide=everywhere,
        namespaces=list(settings.namespaces),
        standalone=True,
    )


def parse(arguments: Sequence[str]) -> Settings:
    """Parse the flags, with the environment as defaults. Exit with status 2 if they are invalid."""
    parser = argparse.ArgumentParser(prog="isthmus-operator", description="Runs FederatedJobs.")
    default = Settings()
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-A", "--all-namespaces", action="store_true", help="serve every namespace")
    where.add_argument("-n", "--namespace", action="append", metavar="NS", help="serve this namespace; repeatable")
    parser.add_argument("--exclude-namespace", action="append", metavar="NS",
                        help="with --all-namespaces: do not serve this namespace; repeatable")  # fmt: skip
    parser.add_argument(
        "--cluster", default=_env("CLUSTER", ""), help="name of this cluster, which identifies it at sites"
    )
    parser.add_argument("--signing-root", default=_env("SIGNING_ROOT", ""), metavar="NAMESPACE/NAME",
                        help="Secret of the cluster's signing root for secure aggregation, which is created if it is"
                        f" missing (default: {SIGNING_ROOT} in the operator's own namespace)")  # fmt: skip
    parser.add_argument("--no-sites", dest="sites", action="store_false", default=_env("NO_SITES", "") not in _YES,
                        help="serve no HPC sites, so that no cluster-scoped rights are needed")  # fmt: skip
    parser.add_argument("--no-network-policies", dest="network_policies", action="store_false",
                        default=_env("NO_NETWORK_POLICIES", "") not in _YES,
                        help="create no NetworkPolicies")  # fmt: skip
    parser.add_argument("--metrics", type=_address, default=_env("METRICS", default.metrics), metavar="HOST:PORT")
    parser.add_argument("--health", type=_address, default=_env("HEALTH", default.health), metavar="HOST:PORT")
    parser.add_argument("--workers", type=_positive, default=_env("WORKERS", default.workers), metavar="N",
                        help="jobs reconciled at the same time")  # fmt: skip
    parser.add_argument("--api-concurrency", type=_positive, metavar="N",
                        default=_env("API_CONCURRENCY", default.api_concurrency),
                        help="requests to the API server at the same time")  # fmt: skip
    parser.add_argument("--request-timeout", type=_seconds, metavar="SECONDS",
                        default=_env("REQUEST_TIMEOUT", default.request_timeout))  # fmt: skip
    parser.add_argument("--resync", type=_seconds, default=_env("RESYNC", default.resync), metavar="SECONDS",
                        help="interval between reconciliations of a running job")  # fmt: skip
    parser.add_argument("--site-give-up", type=_seconds, metavar="SECONDS",
                        default=_env("SITE_GIVE_UP", default.site_give_up),
                        help="how long a deleted job waits for a site that does not respond")  # fmt: skip
    parser.add_argument("--allow-in-templates", type=_allowances, metavar="WHAT,...",
                        default=_env("ALLOW_IN_TEMPLATES", ""),
                        help=f"exceptions that users' pod templates may use: {', '.join(ALLOWANCES)}")  # fmt: skip
    parser.add_argument("--secrets-in-templates", default=_env("SECRETS_IN_TEMPLATES", ""), metavar="GLOB,...",
                        help="Secrets that users' pod templates may name (default: all but Isthmus' own)")  # fmt: skip
    parser.add_argument("--config-maps-in-templates", default=_env("CONFIG_MAPS_IN_TEMPLATES", ""), metavar="GLOB,...",
                        help="likewise for ConfigMaps, including that of task.code")  # fmt: skip
    parser.add_argument("--job-defaults", default=_env("JOB_DEFAULTS", ""), metavar="FILE",
                        help="defaults for pods and Services of all jobs (YAML)")  # fmt: skip
    parser.add_argument("--webhook", type=_address, default=_env("WEBHOOK", "") or None, metavar="HOST:PORT",
                        help="serve the admission webhook here")  # fmt: skip
    parser.add_argument("--webhook-tls", default=_env("WEBHOOK_TLS", default.webhook_tls), metavar="DIR",
                        help="tls.crt and tls.key of the webhook")  # fmt: skip
    parser.add_argument("--gateway", type=_address, default=_env("GATEWAY", "") or None, metavar="HOST:PORT",
                        help="serve the gateway for sites that dial out here")  # fmt: skip
    parser.add_argument("--gateway-tls", default=_env("GATEWAY_TLS", default.gateway_tls), metavar="DIR",
                        help="tls.crt and tls.key of the gateway")  # fmt: skip
    parser.add_argument("--log-level", choices=_LEVELS, default=_env("LOG_LEVEL", default.log_level))
    parser.add_argument("--log-format", choices=("plain", "json"), default=_env("LOG_FORMAT", default.log_format))
    parser.add_argument("--version", action="version", version=__version__)
    given = parser.parse_args(arguments)
    namespaces = given.namespace or [item for item in _env("NAMESPACES", "").split(",") if item]
    everywhere = given.all_namespaces or (not given.namespace and _env("ALL_NAMESPACES", "") in _YES)
    if everywhere == bool(namespaces) and not (given.all_namespaces and not given.namespace):
        parser.error("give --all-namespaces, or --namespace for each namespace to serve")
    excluded = given.exclude_namespace or [item for item in _env("EXCLUDE_NAMESPACES", "").split(",") if item]
    if excluded and not everywhere:
        parser.error("--exclude-namespace needs --all-namespaces")
    for namespace in (*namespaces, *excluded):
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", namespace):
            parser.error(f"--namespace: {namespace!r} is not a valid name of a namespace")
    if given.log_level not in _LEVELS or given.log_format not in ("plain", "json"):
        parser.error("ISTHMUS_LOG_LEVEL or ISTHMUS_LOG_FORMAT has an unknown value")
    if given.signing_root and not re.fullmatch(r"[a-z0-9][-a-z0-9]*/[a-z0-9][-a-z0-9.]*", given.signing_root):
        parser.error(f"--signing-root: {given.signing_root!r} is not of the form NAMESPACE/NAME")
    if given.gateway and not given.sites:
        parser.error("--gateway cannot be combined with --no-sites")
    try:
        defaults = load(Path(given.job_defaults), given.allow_in_templates) if given.job_defaults else NONE
    except DefaultsError as error:
        parser.error(f"--job-defaults {given.job_defaults}: {error}")
    return Settings(
        namespaces=() if everywhere else tuple(dict.fromkeys(namespaces)),
        excluded=frozenset(excluded),
        cluster=given.cluster,
        sites=given.sites,
        signing_root=given.signing_root,
        network_policies=given.network_policies,
        metrics=given.metrics,
        health=given.health,
        workers=given.workers,
        api_concurrency=given.api_concurrency,
        request_timeout=given.request_timeout,
        resync=given.resync,
        site_give_up=given.site_give_up,
        allow_in_templates=given.allow_in_templates
        | _globs("secret", given.secrets_in_templates)
        | _globs("config-map", given.config_maps_in_templates),
        job_defaults=defaults,
        webhook=given.webhook or "",
        webhook_tls=given.webhook_tls,
        gateway=given.gateway or "",
        gateway_tls=given.gateway_tls,
        log_level=given.log_level,
        log_format=given.log_format,
    )


def _env(name: str, default: object) -> str:
    # As text, so that argparse checks it like a flag.
    return os.environ.get(f"ISTHMUS_{name}") or str(default)


def _address(text: str) -> str:
    try:
        port = split(text)[1]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not port:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return text


def _allowances(text: str) -> frozenset[str]:
    given = frozenset(part.strip() for part in text.split(",") if part.strip())
    if unknown := sorted(given - set(ALLOWANCES)):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: unknown; choose from {', '.join(ALLOWANCES)}")
    return given


def _globs(what: str, text: str) -> frozenset[str]:
    return frozenset(f"{what}={part.strip()}" for part in text.split(",") if part.strip())


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _log(settings: Settings) -> None:
    formats = {"plain": kopf.LogFormat.PLAIN, "json": kopf.LogFormat.JSON}
    kopf.configure(
        debug=settings.log_level == "debug",
        quiet=settings.log_level in ("warning", "error"),
        log_format=formats[settings.log_format],
    )
    # Their debug lines about each request would hide everything else.
    for name in ("urllib3", "asyncio", "aiohttp", "kubernetes"):
        logging.getLogger(name).setLevel(logging.WARNING)
    limit_root()


if __name__ == "__main__":
    main()
