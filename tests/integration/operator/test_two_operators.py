"""Tests of two operators that could serve the same jobs."""

from pathlib import Path

from .fake_api_server import ApiServer
from .operator_process import Operator, job, until


def test_one_of_two_operators_of_different_settings_serves_a_job_and_the_other_says_so_once(
    api: ApiServer, operator: Operator, tmp_path: Path
) -> None:
    template = {"spec": {"volumes": [{"name": "h", "hostPath": {"path": "/"}}]}}
    operator.start("-A", "--allow-in-templates", "host-path")
    tenant = Operator(operator.kubeconfig, tmp_path / "tenant.log")
    try:
        tenant.start("-n", "team")
        pools = [{"name": "cloud", "replicas": 1, "cloud": {"template": template}}]
        api.put("federatedjobs", job("one", pools=pools), "team")
        until(lambda: api.events("ServedByAnother"), "the loser says so")
        api.change("federatedjobs", "team", "one", {"spec": {"suspend": True}})
        until(lambda: api.condition("team", "one", "Suspended") == "True/SuspendedByUser"
              or api.condition("team", "one", "Accepted").startswith("False"), "it is served")  # fmt: skip
        first = api.get("federatedjobs", "team", "one")["metadata"]["annotations"]["isthmus.dev/operator"]
        assert len(api.events("ServedByAnother")) == 1
        verdicts = [reason for reason in ("Valid", "TemplateNotAllowed") if api.events(reason)]
        assert len(verdicts) == 1, verdicts
        assert api.get("federatedjobs", "team", "one")["metadata"]["annotations"]["isthmus.dev/operator"] == first
    finally:
        tenant.stop()
