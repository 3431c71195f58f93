"""Tests that remote parties which never respond do not delay jobs that do not need them."""

from .dead_remotes import DeadBridge, dead_site, hpc_job, made, silent_aggregators
from .fake_api_server import ApiServer
from .operator_process import Operator, accepted_after, job, until

# Seconds until an unrelated job is accepted: below 2 on a quiet machine, above 100 if workers wait for dead parties.
BOUND = 10.0
JOBS = 40  # more than twice the operator's workers


def test_jobs_at_a_dead_bridge_do_not_delay_others(api: ApiServer, operator: Operator) -> None:
    dead_site(api, "dead", bridge := DeadBridge())
    api.idle.add("hpc")
    operator.start("-A")
    for number in range(JOBS):
        api.put("federatedjobs", job(f"job{number}", **hpc_job("dead")), "hpc")
    until(lambda: bridge.calls > 1, "the bridge is called")
    during = [accepted_after(api, "other", f"a{number}") for number in range(3)]
    made(api, "hpc", JOBS, "Accepted")
    until(lambda: operator.metric('isthmus_operator_circuit_open{site="dead"}') == 1, "the breaker opens")
    during += [accepted_after(api, "other", f"b{number}") for number in range(3)]
    assert max(during) < BOUND, during


def test_silent_aggregators_do_not_delay_other_jobs(api: ApiServer, operator: Operator) -> None:
    silent_aggregators(api, "silent")
    operator.start("-A")
    for number in range(JOBS):
        api.put("federatedjobs", job(f"job{number}"), "silent")
    during = []
    for number in range(5):
        during.append(accepted_after(api, "other", f"a{number}"))
    made(api, "silent", JOBS, "AggregatorReady")
    until(lambda: operator.metric("isthmus_operator_silent_aggregators") > JOBS / 2, "the breakers open")
    during += [accepted_after(api, "other", f"b{number}") for number in range(3)]
    assert max(during) < BOUND, during


def test_more_dead_sites_than_workers_do_not_delay_a_live_one(api: ApiServer, operator: Operator) -> None:
    for number in range(20):
        dead_site(api, f"dead{number}", DeadBridge())
    operator.start("-A")
    dead_site(api, "live", DeadBridge(describes_itself=True))

    def reachable() -> bool:
        conditions = (api.get("hpcsites", "", "live").get("status") or {}).get("conditions") or ()
        return any(item["type"] == "Reachable" and item["status"] == "True" for item in conditions)

    until(reachable, "the live site is reachable", 60)


def test_a_site_that_answers_only_describe_is_reported_as_unreachable(api: ApiServer, operator: Operator) -> None:
    dead_site(api, "half", DeadBridge(describes_itself=True))
    api.idle.add("hpc")
    operator.start("-A")
    for number in range(4):
        api.put("federatedjobs", job(f"job{number}", **hpc_job("half")), "hpc")

    def message() -> str:
        return str((api.get("hpcsites", "", "half").get("status") or {}).get("message", ""))

    until(lambda: "describes itself, but did not respond to its last calls" in message(), "the status says so")
    assert operator.metric('isthmus_operator_site_reachable{site="half"}') == 0


def test_a_namespace_with_slow_pod_creation_does_not_delay_others(api: ApiServer, operator: Operator) -> None:
    api.slow["slow"] = 20.0
    operator.start("-A")
    for number in range(JOBS):
        api.put("federatedjobs", job(f"job{number}"), "slow")
    made(api, "slow", JOBS // 2, "Accepted")
    during = [accepted_after(api, "other", f"a{number}") for number in range(3)]
    assert max(during) < BOUND, during
