"""Dashboard *Job*: training of one FederatedJob, its time and its traffic."""

from .grafana import Dashboard, Panel, Query, Variable

_JOB = 'namespace="$namespace",job="$job"'


_ACCEPTED = ',result="accepted"'


def _rate(metric: str, more: str = "") -> str:
    return f"rate({metric}{{{_JOB}{more}}}[$__rate_interval])"


DASHBOARD = Dashboard(
    uid="isthmus-job",
    title="Isthmus / Job",
    description="One FederatedJob: its metrics, rounds, clients and bytes.",
    since="now-1h",
    variables=(
        Variable("namespace", "Namespace", "isthmus_operator_rounds_completed"),
        Variable("job", "Job", 'isthmus_operator_rounds_completed{namespace="$namespace"}'),
    ),
    panels=(
        Panel(
            "Rounds",
            "Committed, and asked for.",
            (
                Query(f"max(isthmus_rounds_completed{{{_JOB}}})", "completed"),
                Query(f"max(isthmus_rounds_planned{{{_JOB}}})", "planned"),
            ),
            kind="stat",
            width=6,
        ),
        Panel(
            "Best",
            "The best value yet of the metric that the job aims at.",
            (Query(f"max by (metric) (isthmus_best_metric{{{_JOB}}})", "{{metric}}"),),
            kind="stat",
            width=6,
        ),
        Panel(
            "Clients connected",
            "Of all pools.",
            (Query(f'sum(isthmus_clients{{{_JOB},state="ready"}})'),),
            kind="stat",
            width=6,
        ),
        Panel(
            "Model",
            "The global model, uncompressed.",
            (Query(f"max(isthmus_model_bytes{{{_JOB}}})"),),
            kind="stat",
            unit="bytes",
            width=6,
        ),
        Panel(
            "Accuracy and other metrics",
            "What the evaluation function returns, as of the newest round, with the number of rounds at the right.",
            (
                Query(f'max by (metric) (isthmus_metric{{{_JOB},metric!~".*loss.*"}})', "{{metric}}"),
                Query(f"max(isthmus_rounds_completed{{{_JOB}}})", "rounds", right=True),
            ),
            width=12,
        ),
        Panel(
            "Loss",
            "As of the newest round, with the number of rounds at the right.",
            (
                Query(f'max by (metric) (isthmus_metric{{{_JOB},metric=~".*loss.*"}})', "{{metric}}"),
                Query(f"max(isthmus_rounds_completed{{{_JOB}}})", "rounds", right=True),
            ),
            width=12,
        ),
        Panel(
            "Time by stage",
            "Mean time of a client (or, for push and fold, an update; for checkpoint, a round) in each stage.",
            (
                Query(
                    f"sum by (stage) ({_rate('isthmus_stage_seconds_sum')})"
                    f" / sum by (stage) ({_rate('isthmus_stage_seconds_count')})",
                    "{{stage}}",
                ),
            ),
            unit="s",
            stacked=True,
        ),
        Panel(
            "Round time",
            "From a round's first offer to its commit: the mean, and what nineteen of twenty rounds stay below.",
            (
                Query(
                    f"sum({_rate('isthmus_round_seconds_sum')}) / sum({_rate('isthmus_round_seconds_count')})", "mean"
                ),
                Query(f"histogram_quantile(0.95, sum by (le) ({_rate('isthmus_round_seconds_bucket')}))", "95 %"),
            ),
            unit="s",
        ),
        Panel(
            "The round in progress",
            "Clients that were asked, and those that have handed in: a gap that stays is a straggler.",
            (
                Query(f"max(isthmus_round_clients_selected{{{_JOB}}})", "selected"),
                Query(f"max(isthmus_round_clients_submitted{{{_JOB}}})", "submitted"),
            ),
            steps=True,
        ),
        Panel(
            "Clients by pool and state",
            "As the aggregator sees them, and those that wait to be started.",
            (
                Query(f"sum by (pool, state) (isthmus_clients{{{_JOB}}})", "{{pool}} {{state}}"),
                Query(
                    f'sum by (pool, state) (isthmus_operator_pool_clients{{{_JOB},state="queued"}})',
                    "{{pool}} {{state}}",
                ),
            ),
            steps=True,
        ),
        Panel(
            "How rounds ended for clients",
            "Completed: handed in. Late: still at work when the round ended. Failed: gone, or the update was refused.",
            (
                Query(
                    f"sum by (pool, state) ({_rate('isthmus_clients_finished_total')})",
                    "{{pool}} {{state}}",
                ),
            ),
            unit="cps",
            stacked=True,
        ),
        Panel(
            "Updates by result",
            "What became of what clients sent; docs/operating/metrics.md tells the reasons of refusals.",
            (Query(f"sum by (result) ({_rate('isthmus_updates_total')})", "{{result}}"),),
            unit="cps",
        ),
        Panel(
            "Bytes",
            "Of updates that came in and models that went out, by codec.",
            (
                Query(f"sum by (codec) ({_rate('isthmus_received_bytes_total')})", "received {{codec}}"),
                Query(f"sum by (codec) ({_rate('isthmus_sent_bytes_total')})", "sent {{codec}}"),
            ),
            unit="Bps",
        ),
        Panel(
            "Compression of updates",
            "Bytes that came in, as a share of what the same updates are uncompressed.",
            (
                Query(
                    f"sum({_rate('isthmus_received_bytes_total')})"
                    f" / (sum({_rate('isthmus_updates_total', _ACCEPTED)}) * max(isthmus_model_bytes{{{_JOB}}}))",
                    "share of the raw size",
                ),
            ),
            unit="percentunit",
        ),
        Panel(
            "Staleness of updates",
            "By how many rounds the models were behind from which the counted updates were trained, in the mean.",
            (
                Query(
                    f"sum by (pool) ({_rate('isthmus_update_staleness_rounds_sum')})"
                    f" / sum by (pool) ({_rate('isthmus_update_staleness_rounds_count')})",
                    "{{pool}}",
                ),
            ),
        ),
        Panel(
            "Privacy budget",
            "Epsilon of all models that were published, and the budget, at which training ends. For jobs with"
            " differential privacy.",
            (
                Query(f"max(isthmus_privacy_epsilon{{{_JOB}}})", "epsilon"),
                Query(f"max(isthmus_privacy_epsilon_limit{{{_JOB}}})", "maxEpsilon"),
            ),
            steps=True,
        ),
        Panel(
            "Clipped updates",
            "Of the newest round, the share that was longer than clipNorm. None: the bound, and with it the noise, is"
            " larger than it must be. All: it holds training back.",
            (Query(f"max(isthmus_privacy_clipped_ratio{{{_JOB}}})", "clipped"),),
            unit="percentunit",
            steps=True,
        ),
        Panel(
            "Conditions",
            "1: the condition is True.",
            (
                Query(f"max by (condition) (isthmus_operator_job_condition{{{_JOB}}})", "{{condition}}"),
                Query(f"max(isthmus_checkpoint_failures_total{{{_JOB}}})", "checkpoint failures", right=True),
            ),
            steps=True,
        ),
    ),
)
