"""Dashboard *Fleet*: all jobs and sites, and the operator itself."""

from .grafana import Dashboard, Panel, Query

DASHBOARD = Dashboard(
    uid="isthmus-fleet",
    title="Isthmus / Fleet",
    description="All FederatedJobs and HPC sites, and the operator that serves them.",
    panels=(
        Panel(
            "Jobs running",
            "FederatedJobs that are training.",
            (Query('sum(isthmus_operator_jobs{phase="Running"})'),),
            kind="stat",
            width=6,
        ),
        Panel(
            "Jobs failed",
            "FederatedJobs that failed and are not deleted yet.",
            (Query('sum(isthmus_operator_jobs{phase=~"Failed|Rejected"})'),),
            kind="stat",
            width=6,
            bad_above=1,
        ),
        Panel(
            "Sites that do not answer",
            "HPCSites whose bridge did not answer the operator's last request.",
            (Query("sum(1 - isthmus_operator_site_reachable)"),),
            kind="stat",
            width=6,
            bad_above=1,
        ),
        Panel(
            "Rounds in the last hour",
            "Rounds committed by the aggregators of all jobs.",
            (Query("sum(increase(isthmus_round_seconds_count[1h]))"),),
            kind="stat",
            width=6,
        ),
        Panel(
            "Jobs by phase",
            "The conditions of a job in Pending or Starting give the reason: kubectl describe fj.",
            (Query("sum by (phase) (isthmus_operator_jobs)", "{{phase}}"),),
            stacked=True,
        ),
        Panel(
            "Rounds per hour",
            "Rounds per hour at the current rate, by namespace.",
            (
                Query(
                    "3600 * sum by (namespace) (rate(isthmus_round_seconds_count[$__rate_interval]))", "{{namespace}}"
                ),
            ),
        ),
        Panel(
            "Clients by state",
            "Queued: pending pods, and tasks in Slurm's queue. Ready: connected to their aggregators.",
            (Query("sum by (state) (isthmus_operator_pool_clients)", "{{state}}"),),
        ),
        Panel(
            "Sites",
            "1: the bridge answered the operator's last request. 0: it did not.",
            (Query("min by (site) (isthmus_operator_site_reachable)", "{{site}}"),),
            steps=True,
        ),
        Panel(
            "Wait in the sites' queues",
            "Time from a pool's submission to the start of its tasks: median and 90th percentile of the last hour's"
            " tasks.",
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
            "Clients per second, in finished rounds, that were lost, refused, or still training when the round ended.",
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
            "Reconciliations of jobs",
            "Reconciliations per second, and those that ended with an error and are retried.",
            (
                Query("sum(rate(isthmus_operator_reconcile_seconds_count[$__rate_interval]))", "looks"),
                Query("sum(rate(isthmus_operator_reconcile_errors_total[$__rate_interval]))", "errors"),
            ),
            unit="ops",
        ),
        Panel(
            "The operator's backlog",
            "Jobs that wait for a worker, busy workers, and the delay of the event loop.",
            (
                Query("max(isthmus_operator_queue_depth)", "waiting jobs"),
                Query("max(isthmus_operator_workers_busy)", "busy workers"),
                Query("max(isthmus_operator_loop_lag_seconds)", "lag (s)", right=True),
            ),
        ),
        Panel(
            "Requests to the API server",
            "Requests by HTTP status; none: no response.",
            (Query("sum by (code) (rate(isthmus_operator_api_requests_total[$__rate_interval]))", "{{code}}"),),
            unit="reqps",
        ),
        Panel(
            "Calls to bridges",
            "Calls by site and gRPC status.",
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
