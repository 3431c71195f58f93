"""Common user errors and their messages."""

import json

import pytest

from .conftest import Platform, eventually, run

pytestmark = pytest.mark.timeout(1800)


def test_a_script_that_raises_shows_in_the_pools_status(platform: Platform, job: str) -> None:
    # Only the HPC clients fail. The others wait for that, or they could train all rounds before Slurm starts its tasks.
    manifest = platform.manifest(job, backoffLimit=0, selection__minClients=1, stragglers__minUpdates=1, rounds=3)
    manifest["spec"]["task"]["command"] = [
        "python", "-c",
        "import isthmus, os, runpy, sys, time\n"
        "sys.argv = ['digits']\n"
        "if isthmus.context().pool == 'hpc': raise ValueError('no such column: age')\n"
        "while not os.path.exists('/tmp/go'): time.sleep(0.2)\n"
        "runpy.run_module('isthmus_examples.digits', run_name='__main__')\n",
    ]  # fmt: skip
    platform.apply(manifest)

    def reason() -> str:
        pools = platform.status(job).get("pools", [])
        return next((pool.get("reason", "") for pool in pools if pool["name"] == "hpc"), "")

    eventually("the traceback is in the pool's status", lambda: "ValueError: no such column: age" in reason())
    go = ("python", "-c", "open('/tmp/go', 'w').close(); print('told')")
    for pod in [pod["metadata"]["name"] for pod in platform.pods(job, "client")]:
        eventually(f"{pod} is told", lambda pod=pod: "told" in run("kubectl", "exec", pod, "--", *go, check=False))
    platform.wait_for_completion(job)


def test_a_denial_names_the_rule_of_the_sites_policy(platform: Platform, job: str) -> None:
    platform.apply(platform.manifest(job, pools__1__hpc__partition="debug", rounds=2, selection__minClients=4))
    pools = eventually(
        "the denial is in the pool's status",
        lambda: [pool for pool in platform.status(job).get("pools", []) if "partition" in pool.get("reason", "")],
    )
    assert "debug" in pools[0]["reason"]
    assert "main" in pools[0]["reason"]
    assert not platform.slurm.squeue()


def test_an_unknown_site_is_rejected_and_nothing_is_created(platform: Platform, job: str) -> None:
    platform.apply(platform.manifest(job, pools__1__hpc__siteRef__name="moon"))
    condition = eventually("there is a verdict", lambda: platform.condition(job, "Accepted"))
    assert (condition["status"], condition["reason"]) == ("False", "SiteNotFound")
    assert "moon" in condition["message"]
    assert "pools[1]" in condition["message"]
    assert not platform.leftovers(job)


def test_the_api_server_refuses_what_a_schema_can(platform: Platform, job: str) -> None:
    manifest = platform.manifest(job, rounds=0)
    answer = run("kubectl", "apply", "-f", "-", input=json.dumps(manifest), check=False)
    assert "spec.rounds" in answer
    assert "greater than or equal to 1" in answer
