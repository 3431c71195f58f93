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
            "Committed rounds, and rounds in the manifest.",
            (
                Query(f"max(isthmus_rounds_completed{{{_JOB}}})", "completed"),
                Query(f"max(isthmus_rounds_planned{{{_JOB}}})", "planned"),
            ),
            kind="stat",
            width=6,
        ),
        Panel(
            "Best",
            "Best value so far of the objective's metric.",
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
            "Size of the uncompressed global model.",
            (Query(f"max(isthmus_model_bytes{{{_JOB}}})"),),
            kind="stat",
            unit="bytes",
            width=6,
        ),
        Panel(
            "Accuracy and other metrics",
            "Results of the evaluation function in the newest round; the number of rounds is on the right axis.",
            (
                Query(f'max by (metric) (isthmus_metric{{{_JOB},metric!~".*loss.*"}})', "{{metric}}"),
                Query(f"max(isthmus_rounds_completed{{{_JOB}}})", "rounds", right=True),
            ),
            width=12,
        ),
        Panel(
            "Loss",
            "Values of the newest round; the number of rounds is on the right axis.",
            (
                Query(f'max by (metric) (isthmus_metric{{{_JOB},metric=~".*loss.*"}})', "{{metric}}"),
                Query(f"max(isthmus_rounds_completed{{{_JOB}}})", "rounds", right=True),
            ),
            width=12,
        ),
        Panel(
            "Time by stage",
            "Mean time in each stage: per client, or per update for push and fold, or per round for checkpoint.",
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
            "Time from a round's first offer to its commit: mean and 95th percentile.",
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
            "Clients that received an offer, and clients that submitted an update. A lasting gap means a straggler.",
            (
                Query(f"max(isthmus_round_clients_selected{{{_JOB}}})", "selected"),
                Query(f"max(isthmus_round_clients_submitted{{{_JOB}}})", "submitted"),
            ),
            steps=True,
        ),
        Panel(
            "Clients by pool and state",
            "Clients by state at the aggregator, and clients that are not started yet.",
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
            "Results of clients in rounds",
            "Completed: submitted an update. Late: still training when the round ended. Failed: lost, or the update was"
            " refused.",
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
            "Updates by result; docs/operating/metrics.md lists the reasons of refusals.",
            (Query(f"sum by (result) ({_rate('isthmus_updates_total')})", "{{result}}"),),
            unit="cps",
        ),
        Panel(
            "Bytes",
            "Received updates and sent models, by codec.",
            (
                Query(f"sum by (codec) ({_rate('isthmus_received_bytes_total')})", "received {{codec}}"),
                Query(f"sum by (codec) ({_rate('isthmus_sent_bytes_total')})", "sent {{codec}}"),
            ),
            unit="Bps",
        ),
        Panel(
            "Compression of updates",
            "Received bytes as a share of the uncompressed size of the same updates.",
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
            "Mean age in rounds of the base models of accepted updates.",
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
            "Epsilon of all published models, and the budget at which training ends. For jobs with differential"
            " privacy.",
            (
                Query(f"max(isthmus_privacy_epsilon{{{_JOB}}})", "epsilon"),
                Query(f"max(isthmus_privacy_epsilon_limit{{{_JOB}}})", "maxEpsilon"),
            ),
            steps=True,
        ),
        Panel(
            "Clipped updates",
            "Share of the newest round's updates with a norm above clipNorm. If it is 0, clipNorm and the noise are"
            " larger than necessary. If it is 1, clipping slows training.",
            (Query(f"max(isthmus_privacy_clipped_ratio{{{_JOB}}})", "clipped"),),
            unit="percentunit",
            steps=True,
        ),
        Panel(
            "Secure aggregation: contributors",
            "Clients whose updates are in the newest sum, and those that dropped out of it. For jobs with secure"
            " aggregation.",
            (
                Query(f"max(isthmus_secure_survivors{{{_JOB}}})", "survivors"),
                Query(f"max(isthmus_secure_dropouts{{{_JOB}}})", "dropouts"),
            ),
            stacked=True,
            steps=True,
        ),
        Panel(
            "Secure aggregation: phases",
            "Mean time of each phase of an instance. The phase collect is the clients' training; the others should be"
            " short beside it.",
            (
                Query(
                    f"sum by (phase) ({_rate('isthmus_secure_phase_seconds_sum')})"
                    f" / sum by (phase) ({_rate('isthmus_secure_phase_seconds_count')})",
                    "{{phase}}",
                ),
            ),
            unit="s",
        ),
        Panel(
            "Secure aggregation: clipped coordinates",
            "Share of the coordinates of the newest updates that were beyond the public bound. Above a hundredth, the"
            " bound distorts the model: raise privacy.secureAggregation.clip.",
            (Query(f"max(isthmus_secure_clipped_ratio{{{_JOB}}})", "clipped"),),
            unit="percentunit",
            steps=True,
        ),
        Panel(
            "Secure aggregation: instances and faults",
            "Instances in the last hour by outcome, and clients that were dropped from one, by reason. A failed"
            " instance is done again.",
            (
                Query(f"sum by (outcome) (increase(isthmus_secure_instances_total{{{_JOB}}}[1h]))", "{{outcome}}"),
                Query(
                    f"sum by (reason) (increase(isthmus_secure_faults_total{{{_JOB}}}[1h]))",
                    "fault: {{reason}}",
                    right=True,
                ),
            ),
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
