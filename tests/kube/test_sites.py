"""HPC pools and HPCSites, with a bridge that the test controls behind real gRPC and mutual TLS."""

import json
from typing import Any

from isthmus_contracts.pb import bridge_pb2 as pb

from .bridge import FakeBridge
from .cluster import AGGREGATOR, Namespace, Operator, eventually, kubectl, manifest, read


def site(name: str) -> dict[str, Any]:
    return dict(read(f"/apis/isthmus.dev/v1alpha1/hpcsites/{name}").get("status") or {})


def reachable(name: str) -> str:
    conditions = site(name).get("conditions") or []
    return next((f"{item['status']}/{item['reason']}" for item in conditions if item["type"] == "Reachable"), "")


def finalizers(name: str) -> list[str]:
    metadata = read(f"/apis/isthmus.dev/v1alpha1/hpcsites/{name}").get("metadata") or {}
    return list(metadata.get("finalizers") or ())


def mixed(namespace: Namespace, **spec: Any) -> dict[str, Any]:
    job = manifest(**spec)
    job["spec"]["pools"].append(FakeBridge.pool(namespace.name))
    return job


def test_a_site_is_described(namespace: Namespace, operator: Operator, bridge: FakeBridge) -> None:
    eventually(lambda: reachable(namespace.name) == "True/SiteReachable", "the site is reachable")
    assert site(namespace.name)["slurmVersion"] == "24.11.5"
    assert site(namespace.name)["partitions"] == ["main"]
    bridge.down()
    eventually(lambda: reachable(namespace.name) == "False/SiteUnreachable", "the site is not reachable", 180)
    assert site(namespace.name)["partitions"] == ["main"]


def test_a_site_without_its_secret(namespace: Namespace, operator: Operator, bridge: FakeBridge) -> None:
    namespace.kubectl("delete", "secret", "bridge")
    spec = bridge.site(namespace.name, tls={"secretRef": {"name": "absent", "namespace": namespace.name}})
    kubectl("apply", "-f", "-", stdin=spec)
    eventually(lambda: reachable(namespace.name) == "False/CredentialsMissing", "the Secret is named")


def test_a_pool_from_submission_to_deletion(namespace: Namespace, operator: Operator, bridge: FakeBridge) -> None:
    namespace.apply(mixed(namespace))
    eventually(lambda: namespace.pool("lumi").get("reason") == "Resources", "Slurm's reason is shown")
    assert namespace.pool("lumi")["jobs"] == ["8000"]
    assert namespace.pool("lumi")["queued"] == 2
    (request,) = bridge.requests
    service = namespace.get("service", "demo-aggregator")["spec"]["clusterIP"]
    assert request.spec.federation.endpoint == f"{service}:7443"
    assert request.spec.federation.private_key.startswith(b"-----BEGIN")
    assert (request.spec.first_client, request.spec.total_clients) == (2, 4)
    bridge.move(pb.Pool.RUNNING, queued=0, running=2, reason="")
    eventually(lambda: namespace.pool("lumi")["queued"] == 0, "it runs")
    # A new operator finds it and requests no new pool.
    operator.kill()
    calls = bridge.get_calls
    operator.start()
    # At the second poll, the effects of the first are complete.
    eventually(lambda: bridge.get_calls >= calls + 2, "the site is asked")
    assert len(bridge.requests) == 1
    namespace.kubectl("delete", "fj", "demo", "--timeout=120s")
    assert set(bridge.cancelled) == {request.key}
    namespace.until_bare()


def test_a_site_that_appears_later_is_picked_up(namespace: Namespace, operator: Operator) -> None:
    namespace.apply(mixed(namespace))
    namespace.until("Accepted", "False/SiteNotFound")
    assert namespace.status()["phase"] == "Rejected"
    assert not namespace.leftovers()
    with FakeBridge() as bridge:
        namespace.apply(bridge.secret())
        kubectl("apply", "-f", "-", stdin=bridge.site(namespace.name, allowedNamespaces=["others"]))
        namespace.until("Accepted", "False/SiteNotAllowed")
        kubectl("apply", "-f", "-", stdin=bridge.site(namespace.name))
        namespace.until("Accepted", "True/Valid")
        eventually(lambda: bridge.requests, "the pool is asked for")
        namespace.kubectl("delete", "fj", "demo", "--timeout=120s")
    kubectl("delete", "hpcsite", namespace.name, "--timeout=120s")


def test_a_site_that_is_deleted_stays_until_its_last_array_is_over(
    namespace: Namespace, operator: Operator, bridge: FakeBridge
) -> None:
    assert not finalizers(namespace.name)
    namespace.apply(mixed(namespace))
    eventually(lambda: namespace.pool("lumi").get("jobs") == ["8000"], "the pool is there")
    assert finalizers(namespace.name) == ["isthmus.dev/cleanup"]
    assert site(namespace.name)["inUse"] == {f"{namespace.name}/demo": "lumi"}
    kubectl("delete", "hpcsite", namespace.name, "--wait=false")
    held = f"is being deleted, and held by jobs {namespace.name}/demo (pool lumi)"
    eventually(lambda: site(namespace.name).get("message") == held, "the site says what holds it")
    assert not bridge.cancelled
    # A later job waits, as if the site were gone.
    late = mixed(namespace)
    late["metadata"]["name"] = "late"
    namespace.apply(late)
    namespace.until("Accepted", "False/SiteNotFound", "late")
    assert "is being deleted" in namespace.status("late")["message"]
    namespace.kubectl("delete", "fj", "late", "demo", "--timeout=120s")
    assert set(bridge.cancelled) == set(bridge.pools)
    eventually(lambda: not finalizers(namespace.name) and not site(namespace.name), "the site is gone")


def test_a_deleted_site_whose_bridge_is_dead_is_let_go_by_hand(
    namespace: Namespace, operator: Operator, bridge: FakeBridge
) -> None:
    operator.stop()
    operator.start("--site-give-up", "3")
    namespace.apply(mixed(namespace))
    eventually(lambda: namespace.pool("lumi").get("jobs") == ["8000"], "the pool is there")
    bridge.down()
    kubectl("delete", "hpcsite", namespace.name, "--wait=false")
    namespace.kubectl("delete", "fj", "demo", "--timeout=180s")
    held = f"held by pools of jobs that are gone {namespace.name}/demo (pool lumi)"
    eventually(lambda: held in site(namespace.name).get("message", ""), "the orphan holds it", 180)
    assert not site(namespace.name).get("inUse")
    assert finalizers(namespace.name) == ["isthmus.dev/cleanup"]
    # This is the documented procedure in docs/operating/operator/lifecycle.md.
    removal = '[{"op": "remove", "path": "/metadata/finalizers"}]'
    kubectl("patch", "hpcsite", namespace.name, "--type=json", "-p", removal)
    eventually(lambda: not site(namespace.name), "the site is gone")


def test_a_denied_pool_names_the_rule(namespace: Namespace, operator: Operator, bridge: FakeBridge) -> None:
    bridge.deny = "partitions: gpu is not for you"
    job = mixed(namespace, selection={"minClients": 3})
    # Use an aggregator that never becomes ready: with a ready one that does not answer (the stand-in), the operator
    # waits.
    (aggregator,) = job["spec"]["aggregator"]["template"]["spec"]["containers"]
    aggregator["command"] = ["sh", "-c", AGGREGATOR.replace("httpd -p 7443\n", "")]
    namespace.apply(job)
    namespace.until("Failed", "True/PolicyDenied")
    assert "partitions: gpu is not for you" in namespace.status()["message"]
    namespace.kubectl("delete", "fj", "demo", "--timeout=120s")


def test_a_failed_array_is_submitted_again(namespace: Namespace, operator: Operator, bridge: FakeBridge) -> None:
    namespace.apply(mixed(namespace))
    eventually(lambda: bridge.requests, "the pool is asked for")
    task = pb.Task(index=1, state="FAILED", exit_code=1, log_tail="Traceback\nValueError: no data")
    bridge.move(pb.Pool.FAILED, queued=0, running=0, failed=2, tasks=[task])
    eventually(lambda: any("ValueError: no data" in text for text in namespace.events("ClientFailed")), "it is told")
    eventually(lambda: len(bridge.requests) == 2, "the next attempt")
    assert [request.spec.attempt for request in bridge.requests] == [0, 1]
    eventually(lambda: namespace.pool("lumi")["attempt"] == 1, "the attempt is shown")


def test_deletion_while_the_site_is_down(namespace: Namespace, operator: Operator, bridge: FakeBridge) -> None:
    namespace.apply(mixed(namespace))
    eventually(lambda: namespace.pool("lumi").get("jobs") == ["8000"], "the pool is there")
    bridge.down()
    eventually(lambda: "SiteUnreachable" in namespace.pool("lumi").get("reason", ""), "the site is down", 180)
    namespace.kubectl("delete", "fj", "demo", "--wait=false")
    eventually(lambda: "cancelling pool lumi" in namespace.status().get("message", ""), "the job waits")
    # The pods do not wait.
    eventually(lambda: not namespace.running(), "its pods end")
    operator.kill()
    bridge.up()
    operator.start()
    eventually(lambda: not namespace.get("fj", "demo"), "the job is gone", 240)
    assert set(bridge.cancelled) == set(bridge.pools)
    assert len(bridge.pools) == 1


def test_deletion_gives_up_after_the_stated_time(namespace: Namespace, operator: Operator, bridge: FakeBridge) -> None:
    operator.stop()
    operator.start("--site-give-up", "3")
    namespace.apply(mixed(namespace))
    eventually(lambda: namespace.pool("lumi").get("jobs") == ["8000"], "the pool is there")
    bridge.down()
    namespace.kubectl("delete", "fj", "demo", "--timeout=180s")
    message = eventually(lambda: namespace.events("SiteUnreachable"), "an event says so")[0]
    assert f"pool lumi at {namespace.name}" in message
    # The pool is recorded, and cancelled once the site is back, by any operator that runs then.
    (key,) = bridge.pools
    orphan = site(namespace.name)["orphans"][key]
    assert (orphan["namespace"], orphan["job"], orphan["pool"]) == (namespace.name, "demo", "lumi")
    operator.kill()
    bridge.up()
    operator.start()
    eventually(lambda: set(bridge.cancelled) == {key}, "the orphan is cancelled", 240)
    eventually(lambda: not site(namespace.name).get("orphans"), "nothing is left of it")


def test_a_suspended_job_leaves_the_queue(namespace: Namespace, operator: Operator, bridge: FakeBridge) -> None:
    namespace.apply(mixed(namespace))
    eventually(lambda: bridge.requests, "the pool is asked for")
    namespace.kubectl("patch", "fj", "demo", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    eventually(lambda: bridge.cancelled, "the pool is cancelled")
    namespace.kubectl("patch", "fj", "demo", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    eventually(lambda: len(bridge.requests) == 2, "the next attempt")
    assert bridge.requests[0].key != bridge.requests[1].key


def test_a_slurm_tasks_log_is_handed_on(namespace: Namespace, operator: Operator, bridge: FakeBridge) -> None:
    namespace.apply(mixed(namespace))
    eventually(lambda: namespace.pool("lumi").get("jobs") == ["8000"], "the pool is there")

    def ask(pool: str, identity: str) -> dict[str, Any]:
        request = json.dumps({"id": identity, "pool": pool, "index": 1, "lines": 7})
        namespace.kubectl("annotate", "fj", "demo", f"isthmus.dev/log-request={request}", "--overwrite")

        def answer() -> dict[str, Any]:
            data = dict(namespace.get("configmap", "demo-log").get("data") or {})
            return data if data.get("id") == identity else {}

        return eventually(answer, "it is answered")

    assert ask("lumi", "a")["log"] == "task 1: 7 lines\nepoch 1\n"
    assert "has not been submitted" in ask("other", "b")["error"]
    # An invalid request is ignored.
    namespace.kubectl("annotate", "fj", "demo", "isthmus.dev/log-request={]", "--overwrite")
    assert ask("lumi", "c")["attempt"] == "0"
    namespace.kubectl("delete", "fj", "demo", "--timeout=120s")
    namespace.until_bare()
