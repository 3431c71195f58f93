"""Tests with several namespaces, one of which revokes the operator's rights."""

import json
import urllib.request

from .fake_api_server import ApiServer
from .operator_process import Operator, accepted_after, until


def refused(operator: Operator) -> dict[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{operator.health_port}/readyz", timeout=5) as answer:
        return dict(json.loads(answer.read())["refused"])


def test_a_refused_namespace_is_reported_and_the_others_are_served(api: ApiServer, operator: Operator) -> None:
    api.watch_seconds = 1.0
    operator.start("-n", "a", "-n", "b", "--no-sites")
    for namespace in ("a", "b"):
        accepted_after(api, namespace, "before")
    api.forbidden.add("a")
    # Changes in both are noticed; the reconciliation in a is refused.
    api.change("federatedjobs", "a", "before", {"spec": {"suspend": True}})
    until(lambda: "a" in refused(operator), "readiness tells of it")
    assert set(refused(operator)) == {"a"}
    assert operator.metric('isthmus_operator_namespace_served{namespace="a"}') == 0
    assert operator.metric('isthmus_operator_namespace_served{namespace="b"}') == 1
    assert accepted_after(api, "b", "during") < 10
    assert "the namespace a is not served" in operator.log.read_text(encoding="utf-8")
    api.forbidden.clear()
    until(lambda: not refused(operator), "it is served again")
    assert accepted_after(api, "a", "after") < 60
    assert operator.process is not None
    assert operator.process.poll() is None


def test_it_starts_where_one_namespace_is_refused(api: ApiServer, operator: Operator) -> None:
    api.forbidden.add("a")
    operator.start("-n", "a", "-n", "b", "--no-sites")
    until(lambda: refused(operator), "readiness tells of it")
    assert accepted_after(api, "b", "one") < 10


def test_it_is_not_ready_where_every_namespace_is_refused(api: ApiServer, operator: Operator) -> None:
    operator.start("-n", "a", "-n", "b", "--no-sites")
    accepted_after(api, "a", "one")
    accepted_after(api, "b", "one")
    api.forbidden |= {"a", "b"}
    for namespace in ("a", "b"):
        api.change("federatedjobs", namespace, "one", {"spec": {"suspend": True}})
    until(lambda: operator.probe("/readyz") == 503, "it is not ready")
    assert operator.probe("/healthz") == 200
    api.forbidden.clear()
    until(lambda: operator.probe("/readyz") == 200, "it is ready")


def test_the_watch_of_a_refused_namespace_restarts_after_any_time(api: ApiServer, operator: Operator) -> None:
    """By default kopf gives up after 54 seconds."""
    api.watch_seconds = 1.0
    operator.start("-n", "a", "-n", "b", "--no-sites")
    api.forbidden.add("a")
    until(lambda: operator.log.read_text(encoding="utf-8").count("failed; will retry") >= 18, "many trials", 300)
    assert operator.process is not None
    assert operator.process.poll() is None
    assert accepted_after(api, "b", "one") < 10
