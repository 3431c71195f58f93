"""Dashboard *Fleet*: all jobs and sites, and the operator itself."""

from .grafana import Dashboard, Panel, Query

DASHBOARD = Dashboard(
    uid="isthmus-fleet",
    title="Isthmus / Fleet",
    description="All FederatedJobs and HPC sites, and the operator that serves them.",
    panels=(
        Panel(
            "Jobs running",
            "FederatedJobs whose rounds go on.",
            (Query('sum(isthmus_operator_jobs{phase="Running"})'),),
            kind="stat",
            width=6,
        ),
        Panel(
            "Jobs failed",
            "FederatedJobs that failed, and were not deleted yet.",
            (Query('sum(isthmus_operator_jobs{phase=~"Failed|Rejected"})'),),
            kind="stat",
            width=6,
            bad_above=1,
        ),
        Panel(
            "Sites that do not answer",
            "HPCSites whose bridge did not answer the operator last.",
            (Query("sum(1 - isthmus_operator_site_reachable)"),),
            kind="stat",
            width=6,
            bad_above=1,
        ),
        Panel(
            "Rounds in the last hour",
            "Rounds that aggregators committed, over all jobs.",
            (Query("sum(increase(isthmus_round_seconds_count[1h]))"),),
            kind="stat",
            width=6,
        ),
        Panel(
            "Jobs by phase",
            "A job that waits long in Pending or Starting tells why in its conditions: kubectl describe fj.",
            (Query("sum by (phase) (isthmus_operator_jobs)", "{{phase}}"),),
            stacked=True,
        ),
        Panel(
            "Rounds per hour",
            "At the present speed, by namespace.",
            (
                Query(
                    "3600 * sum by (namespace) (rate(isthmus_round_seconds_count[$__rate_interval]))", "{{namespace}}"
                ),
            ),
        ),
        Panel(
            "Clients by state",
            "Queued: pods that are pending, and tasks in the queue of Slurm. Ready: connected to their aggregators.",
            (Query("sum by (state) (isthmus_operator_pool_clients)", "{{state}}"),),
        ),
        Panel(
            "Sites",
            "1: the bridge answered the operator last. 0: it did not.",
            (Query("min by (site) (isthmus_operator_site_reachable)", "{{site}}"),),
            steps=True,
        ),
        Panel(
            "Wait in the sites' queues",
            "From a pool's submission to the start of its tasks: of those that started within the hour, the median and"
            " what nine of ten stay below.",
            tuple(
                Query(
                    f"histogram_quantile({share}, sum by (site, le)"
                    " (increase(isthmus_bridge_queue_wait_seconds_bucket[1h])))",
                    f"{{{{site}}}} {name}",
                )
                for share, name in (("0.5", "median"), ("0.9", "90 %"))
            ),
            unit="s",
        ),
        Panel(
            "Clients that failed or were late",
            "Clients of rounds that are over, per second: gone or refused, or still at work when the round ended.",
            (
                Query(
                    "sum by (namespace, state)"
                    ' (rate(isthmus_clients_finished_total{state!="completed"}[$__rate_interval]))',
                    "{{namespace}} {{state}}",
                ),
            ),
            unit="cps",
        ),
        Panel(
            "The operator's looks at jobs",
            "How many, and how many an error cut short: those are repeated.",
            (
                Query("sum(rate(isthmus_operator_reconcile_seconds_count[$__rate_interval]))", "looks"),
                Query("sum(rate(isthmus_operator_reconcile_errors_total[$__rate_interval]))", "errors"),
            ),
            unit="ops",
        ),
        Panel(
            "The operator's backlog",
            "Jobs that wait for a worker, workers that are busy, and how late its event loop runs.",
            (
                Query("max(isthmus_operator_queue_depth)", "waiting jobs"),
                Query("max(isthmus_operator_workers_busy)", "busy workers"),
                Query("max(isthmus_operator_loop_lag_seconds)", "lag (s)", right=True),
            ),
        ),
        Panel(
            "Requests to the API server",
            "By their HTTP status; none: no answer.",
            (Query("sum by (code) (rate(isthmus_operator_api_requests_total[$__rate_interval]))", "{{code}}"),),
            unit="reqps",
        ),
        Panel(
            "Calls to bridges",
            "By site and gRPC status.",
            (
                Query(
                    "sum by (site, code) (rate(isthmus_operator_bridge_calls_total[$__rate_interval]))",
                    "{{site}} {{code}}",
                ),
            ),
            unit="reqps",
        ),
    ),
)
