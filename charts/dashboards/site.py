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
            "1: yes. While it is 0, pools are UNKNOWN and nothing ends.",
            (Query(f"min(isthmus_bridge_slurm_up{{{_SITE}}})"),),
            kind="stat",
            width=6,
            bad_below=1,
        ),
        Panel(
            "The bridge answers the operator",
            "1: yes. While it is 0, jobs go on, and their status tells.",
            (Query(f"min(isthmus_operator_site_reachable{{{_SITE}}})"),),
            kind="stat",
            width=6,
            bad_below=1,
        ),
        Panel(
            "Doubtful submissions",
            "Pools of which the bridge does not know whether Slurm has them: it looks them up before anything else.",
            (Query(f'sum(isthmus_bridge_pools{{{_SITE},state="UNKNOWN"}})'),),
            kind="stat",
            width=6,
            bad_above=1,
        ),
        Panel(
            "Certificates end in",
            "The bridge's own, and the one with which the operator calls it.",
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
            "Array tasks of the pools that are not over, by what Slurm says of them.",
            (Query(f"sum by (state) (isthmus_bridge_tasks{{{_SITE}}})", "{{state}}"),),
            stacked=True,
        ),
        Panel(
            "Pools",
            "That are not over, by the state in the bridge's journal.",
            (Query(f"sum by (state) (isthmus_bridge_pools{{{_SITE}}})", "{{state}}"),),
            stacked=True,
        ),
        Panel(
            "Wait in the queue",
            "From a pool's submission to the start of its tasks: of those that started within the hour, the median and"
            " what nine of ten stay below.",
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
            "Runs of sbatch by result. Deferred: tried again later. Ambiguous: looked up.",
            (Query(f"sum by (result) (increase(isthmus_bridge_submissions_total{{{_SITE}}}[1h]))", "{{result}}"),),
        ),
        Panel(
            "What the policy denied",
            "Requests since the bridge's start, by the rule that denied them.",
            (Query(f"sum by (rule) (isthmus_bridge_denials_total{{{_SITE}}})", "{{rule}}"),),
            steps=True,
        ),
        Panel(
            "After doubtful submissions",
            "Since the bridge's start: arrays that were found and adopted, surplus ones that were cancelled (should"
            " stay 0), and look-ups that failed.",
            (
                Query(f"sum(isthmus_bridge_adoptions_total{{{_SITE}}})", "adopted"),
                Query(f"sum(isthmus_bridge_extra_arrays_cancelled_total{{{_SITE}}})", "cancelled"),
                Query(f"sum(isthmus_bridge_lookup_failures_total{{{_SITE}}})", "look-ups failed"),
            ),
            steps=True,
        ),
        Panel(
            "Requests to the bridge",
            "By method and gRPC status.",
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
            "Mean run time by program.",
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
            "What nine of ten calls stay below, by method, as seen from the cluster.",
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
