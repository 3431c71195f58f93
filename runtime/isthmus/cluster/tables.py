"""Tables of ``status`` and ``sites``, as pure functions of API objects."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

Body = Mapping[str, Any]
_COLOURS = {"Complete": "green", "Failed": "red", "Rejected": "red", "Running": "cyan", "Suspended": "yellow"}


def condition(body: Body, type_: str) -> bool:
    """Return whether a condition of an object is True."""
    found = (body.get("status") or {}).get("conditions") or ()
    return any(item.get("type") == type_ and item.get("status") == "True" for item in found)


def has_ended(job: Body) -> bool:
    """Return whether a job has ended."""
    return condition(job, "Complete") or condition(job, "Failed")


def job_view(job: Body) -> Group:
    """Render a job: rounds, metrics, and each pool's clients and queue."""
    status, spec = job.get("status") or {}, job.get("spec") or {}
    phase = str(status.get("phase") or "Pending")
    rounds = status.get("rounds") or {}
    metrics = [f"{item['name']} {item['value']} (round {item['round']})" for item in status.get("metrics") or ()]
    best = status.get("bestMetric")
    head = Text.assemble(
        (job["metadata"]["name"], "bold"), "  ", (phase, _COLOURS.get(phase, "")),
        f"  round {rounds.get('completed', 0)}/{rounds.get('total', spec.get('rounds', 0))}",
        f"  clients {(status.get('clients') or {}).get('summary', '0/0')}",
    )  # fmt: skip
    lines: list[Any] = [head]
    if metrics:
        lines.append(Text(", ".join(metrics) + (f"; best {best['value']} (round {best['round']})" if best else "")))
    if privacy := status.get("privacy"):
        budget = ((spec.get("privacy") or {}).get("differentialPrivacy") or {}).get("maxEpsilon")
        of = f" of {budget}" if budget else ""
        lines.append(Text(f"privacy: epsilon {privacy['epsilon']}{of} (delta {privacy['delta']})"))
    secured = next((c for c in status.get("conditions") or () if c.get("type") == "SecurelyAggregated"), None)
    if secured is not None:
        style = "yellow" if secured.get("status") == "False" else ""
        lines.append(Text(f"secure aggregation: {secured.get('message', '')}", style))
    if status.get("message"):
        lines.append(Text(str(status["message"])))
    table = Table(box=None, pad_edge=False)
    for title in ("pool", "world"):
        table.add_column(title)
    for title in ("clients", "queued", "connected", "failed"):
        table.add_column(title, justify="right")
    table.add_column("Slurm jobs")
    table.add_column("reason")
    seen = {pool.get("name"): pool for pool in status.get("pools") or ()}
    for pool in spec.get("pools") or ():
        shown = seen.get(pool["name"], {})
        world = "cloud" if "cloud" in pool else f"hpc {((pool.get('hpc') or {}).get('siteRef') or {}).get('name', '')}"
        counts = [
            shown.get("desired", pool.get("replicas", 1)),
            *(shown.get(key, 0) for key in ("queued", "ready", "failed")),
        ]
        reason = str(shown.get("reason", "")).strip().splitlines()
        table.add_row(
            pool["name"],
            world,
            *map(str, counts),
            ", ".join(shown.get("jobs") or ()),
            Text(reason[-1] if reason else ""),
        )
    lines.append(table)
    if status.get("model"):
        lines.append(Text(f"model of round {status['model']['round']}: isthmus model get {job['metadata']['name']}"))
    if status.get("bestModel"):
        number = status["bestModel"]["round"]
        lines.append(Text(f"best model, of round {number}: isthmus model get --best {job['metadata']['name']}"))
    return Group(*lines)


def jobs_table(jobs: Sequence[Body]) -> Table:
    """Render a namespace's jobs, one per line."""
    table = Table(box=None, pad_edge=False)
    for title in ("name", "phase", "round", "clients", "best"):
        table.add_column(title)
    for job in jobs:
        status = job.get("status") or {}
        rounds = status.get("rounds") or {}
        best = status.get("bestMetric") or {}
        table.add_row(
            job["metadata"]["name"], str(status.get("phase") or "Pending"),
            f"{rounds.get('completed', 0)}/{rounds.get('total', (job.get('spec') or {}).get('rounds', 0))}",
            (status.get("clients") or {}).get("summary", ""),
            f"{best['name']} {best['value']}" if best else "",
        )  # fmt: skip
    return table


def sites_table(sites: Sequence[Body], namespace: str) -> Table:
    """Render the sites, with the names that a manifest in this namespace may use."""
    table = Table(box=None, pad_edge=False)
    for title in ("site", "reachable", "open to you", "environments", "partitions", "data sets"):
        table.add_column(title)
    for site in sites:
        status, spec = site.get("status") or {}, site.get("spec") or {}
        allowed = spec.get("allowedNamespaces") or ()
        table.add_row(
            site["metadata"]["name"],
            "yes" if condition(site, "Reachable") else "no",
            "yes" if "*" in allowed or namespace in allowed else "no",
            *(", ".join(status.get(key) or ()) for key in ("environments", "partitions", "dataSets")),
        )
    return table
