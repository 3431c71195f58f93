"""Dashboard *Site*: one HPC site, from the metrics of its bridge and of the operator."""

from .grafana import Dashboard, Panel, Query, Variable

_SITE = 'site="$site"'


def _rate(metric: str) -> str:
    return f"rate({metric}{{{_SITE}}}[$__rate_interval])"


DASHBOARD = Dashboard(
    uid="isthmus-site",
    title="Isthmus / Site",
    description="One HPC site: its queue, its bridge, and what its policy denied.",
    variables=(Variable("site", "Site", "isthmus_bridge_info"),),
    panels=(
        Panel(
            "Slurm answers the bridge",
            "1: yes. While it is 0, pools are UNKNOWN and none is ended.",
            (Query(f"min(isthmus_bridge_slurm_up{{{_SITE}}})"),),
            kind="stat",
            width=6,
            bad_below=1,
        ),
        Panel(
            "The bridge answers the operator",
            "1: yes. While it is 0, jobs continue, and their status reports it.",
            (Query(f"min(isthmus_operator_site_reachable{{{_SITE}}})"),),
            kind="stat",
            width=6,
            bad_below=1,
        ),
        Panel(
            "Doubtful submissions",
            "Pools that Slurm may or may not have accepted: the bridge looks them up first.",
            (Query(f'sum(isthmus_bridge_pools{{{_SITE},state="UNKNOWN"}})'),),
            kind="stat",
            width=6,
            bad_above=1,
        ),
        Panel(
            "Certificates end in",
            "Certificates of the bridge and of the operator's connection to it.",
            (
                Query(f"min(isthmus_bridge_certificate_expiry_timestamp_seconds{{{_SITE}}}) - time()", "bridge"),
                Query(
                    f"min(isthmus_operator_site_certificate_expiry_timestamp_seconds{{{_SITE}}}) - time()", "operator"
                ),
            ),
            kind="stat",
            unit="s",
            width=6,
            bad_below=30 * 86400,
        ),
        Panel(
            "Tasks",
            "Array tasks of active pools, by state in Slurm.",
            (Query(f"sum by (state) (isthmus_bridge_tasks{{{_SITE}}})", "{{state}}"),),
            stacked=True,
        ),
        Panel(
            "Pools",
            "Active pools, by state in the bridge's journal.",
            (Query(f"sum by (state) (isthmus_bridge_pools{{{_SITE}}})", "{{state}}"),),
            stacked=True,
        ),
        Panel(
            "Wait in the queue",
            "Time from a pool's submission to the start of its tasks: median and 90th percentile of the last hour's"
            " tasks.",
            tuple(
                Query(
                    f"histogram_quantile({share}, sum by (le)"
                    f" (increase(isthmus_bridge_queue_wait_seconds_bucket{{{_SITE}}}[1h])))",
                    name,
                )
                for share, name in (("0.5", "median"), ("0.9", "90 %"))
            ),
            unit="s",
        ),
        Panel(
            "Submissions in the last hour",
            "Runs of sbatch by result. Deferred: retried later. Ambiguous: looked up.",
            (Query(f"sum by (result) (increase(isthmus_bridge_submissions_total{{{_SITE}}}[1h]))", "{{result}}"),),
        ),
        Panel(
            "Requests denied by the policy",
            "Denied requests since the bridge's start, by rule.",
            (Query(f"sum by (rule) (isthmus_bridge_denials_total{{{_SITE}}})", "{{rule}}"),),
            steps=True,
        ),
        Panel(
            "After ambiguous submissions",
            "Since the bridge's start: arrays that were found and adopted, surplus arrays that were cancelled (should"
            " stay 0), and failed look-ups.",
            (
                Query(f"sum(isthmus_bridge_adoptions_total{{{_SITE}}})", "adopted"),
                Query(f"sum(isthmus_bridge_extra_arrays_cancelled_total{{{_SITE}}})", "cancelled"),
                Query(f"sum(isthmus_bridge_lookup_failures_total{{{_SITE}}})", "look-ups failed"),
            ),
            steps=True,
        ),
        Panel(
            "Requests to the bridge",
            "Requests by method and gRPC status.",
            (
                Query(
                    f"sum by (method, code) ({_rate('isthmus_bridge_requests_total')})",
                    "{{method}} {{code}}",
                ),
            ),
            unit="reqps",
        ),
        Panel(
            "Slurm's commands",
            "Mean run time of Slurm's programs.",
            (
                Query(
                    f"sum by (program) ({_rate('isthmus_bridge_slurm_command_seconds_sum')})"
                    f" / sum by (program) ({_rate('isthmus_bridge_slurm_command_seconds_count')})",
                    "{{program}}",
                ),
            ),
            unit="s",
        ),
        Panel(
            "The operator's calls",
            "90th percentile of the call time by method, measured by the operator.",
            (
                Query(
                    "histogram_quantile(0.9, sum by (method, le)"
                    f" ({_rate('isthmus_operator_bridge_call_seconds_bucket')}))",
                    "{{method}}",
                ),
            ),
            unit="s",
        ),
    ),
)
