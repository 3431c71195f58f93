"""The settings of the command line."""

from dataclasses import dataclass

from .render.defaults import NONE, JobDefaults


@dataclass(frozen=True)
class Settings:
    """All flags of the operator; see ``isthmus-operator --help``."""

    namespaces: tuple[str, ...] = ()  # empty: all
    excluded: frozenset[str] = frozenset()  # namespaces that are not served if all others are
    cluster: str = ""  # empty: the uid of kube-system
    sites: bool = True
    signing_root: str = ""  # namespace/name of its Secret; empty: the operator's own namespace
    metrics: str = "[::]:8080"
    health: str = "[::]:8081"
    workers: int = 16
    api_concurrency: int = 16
    request_timeout: float = 30.0
    resync: float = 3.0
    site_give_up: float = 3600.0
    network_policies: bool = True
    allow_in_templates: frozenset[str] = frozenset()  # see render/restrict.py
    job_defaults: JobDefaults = NONE  # from the file --job-defaults
    webhook: str = ""  # empty: not served
    webhook_tls: str = "/etc/isthmus/webhook"
    gateway: str = ""  # empty: bridges cannot dial in
    gateway_tls: str = "/etc/isthmus/gateway"
    log_level: str = "info"
    log_format: str = "plain"
