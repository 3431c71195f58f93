"""A job's life on a real API server and a real kubelet, with stand-ins for the aggregator and the clients."""

import json
import threading
import time

import pytest

from .cluster import Namespace, Operator, eventually, kubectl, manifest, pod_template

PODS = {"demo-aggregator", "demo-cloud-0-0", "demo-cloud-1-0"}


@pytest.fixture
def running(namespace: Namespace, operator: Operator) -> Namespace:
    """Start a job, and wait until its pods run."""
    namespace.apply(manifest(backoffLimit=1))
    eventually(lambda: namespace.running() >= PODS, "the pods run", 180)
    namespace.until("AggregatorReady", "True/AggregatorRunning")
    return namespace


def test_from_apply_to_delete(running: Namespace, operator: Operator) -> None:
    job = running.get("fj", "demo")
    assert running.names("service") == {"demo-aggregator"}
    assert running.names("secret") == {
        "demo-ca", "demo-aggregator-tls", "demo-observer-tls", "demo-cloud-tls",
    }  # fmt: skip
    assert running.names("configmap") == {"demo-job"}
    assert running.names("persistentvolumeclaim") == {"demo-checkpoints"}
    assert running.names("networkpolicy") == {"demo-aggregator", "demo-clients"}
    for kind in ("pod", "service", "secret", "configmap", "persistentvolumeclaim"):
        for item in running.items(kind):
            (owner,) = item["metadata"]["ownerReferences"]
            assert (owner["kind"], owner["uid"]) == ("FederatedJob", job["metadata"]["uid"])
    assert running.condition("Accepted") == "True/Valid"
    assert running.condition("Suspended") == "False/NotSuspended"
    assert running.status()["clients"]["summary"] == "0/2"
    # Only the clients can read their certificates.
    seen = running.kubectl("exec", "demo-cloud-0-0", "--", "sh", "-c", "id -u; ls -lL /etc/isthmus/tls; env")
    assert seen.startswith("65532\n")
    assert "-r--r-----" in seen
    assert "ISTHMUS_CLIENT=0" in seen
    assert f"ISTHMUS_ENDPOINT=demo-aggregator.{running.name}.svc:7443" in seen

    running.touch("demo-aggregator", "/var/lib/isthmus/complete")
    running.kubectl("wait", "--for=condition=Complete", "fj/demo", "--timeout=120s")
    status = running.status()
    assert status["phase"] == "Complete"
    assert status["bestMetric"] == {"name": "accuracy", "value": "0.9361", "round": 3}
    assert status["model"]["uri"] == f"pvc://{running.name}/demo-checkpoints/model.safetensors"
    eventually(lambda: running.events("RoundsCompleted") == ["3 rounds completed"], "an event says so")
    table = running.kubectl("get", "fj")
    assert [word in table for word in ("PHASE", "Complete", "0.9361")] == [True] * 3
    clients = f'isthmus_operator_pool_clients{{job="demo",namespace="{running.name}",pool="cloud"'

    def counted(number: int, shown: bool) -> bool:
        metrics = operator.metrics()
        return f'isthmus_operator_jobs{{phase="Complete"}} {number}.0' in metrics and (clients in metrics) is shown

    eventually(lambda: counted(1, True), "it is counted", show=operator.metrics)

    running.kubectl("delete", "fj", "demo", "--timeout=120s")
    running.until_bare()
    eventually(lambda: counted(0, False), "it counts no more", show=operator.metrics)


def test_deletion_at_once_leaves_nothing(namespace: Namespace, operator: Operator) -> None:
    namespace.apply(manifest())
    eventually(lambda: namespace.names("pod"), "the first pods")
    namespace.kubectl("delete", "fj", "demo", "--timeout=120s")
    namespace.until_bare()


def test_foreground_deletion_leaves_nothing(running: Namespace) -> None:
    running.kubectl("delete", "fj", "demo", "--cascade=foreground", "--timeout=180s")
    running.until_bare()


def test_a_failed_client_shows_its_error_and_is_restarted_within_limits(running: Namespace) -> None:
    running.touch("demo-cloud-0-0", "/tmp/fail")  # noqa: S108 - in the pod
    eventually(lambda: "ValueError: no data" in running.pool().get("reason", ""), "the traceback is shown")
    eventually(lambda: "demo-cloud-0-1" in running.running(), "the client is started again")
    (event,) = eventually(lambda: running.events("ClientFailed"), "an event says so")
    assert "ValueError: no data" in event
    # Its log still exists.
    assert "ValueError: no data" in running.kubectl("logs", "demo-cloud-0-0")
    running.touch("demo-cloud-0-1", "/tmp/fail")  # noqa: S108
    eventually(lambda: len(running.events("ClientFailed")) == 2, "the second failure is told")
    # The aggregator is a stand-in and cannot report that training is complete. While it runs, the job neither fails nor
    # restarts it.
    assert "demo-cloud-0-2" not in running.names("pod")
    eventually(lambda: running.pool()["failed"] == 1, "it is counted")


def test_a_deleted_client_is_replaced_without_counting(running: Namespace) -> None:
    for attempt in range(3):
        running.kubectl("delete", "pod", f"demo-cloud-0-{attempt}", "--wait=false")
        wanted = f"demo-cloud-0-{attempt + 1}"
        eventually(lambda: wanted in running.running(), f"{wanted} runs")  # noqa: B023
    assert not running.events("ClientFailed")


def test_an_evicted_client_is_replaced_without_counting(running: Namespace) -> None:
    eviction = {
        "apiVersion": "policy/v1beta1",
        "kind": "Eviction",
        "metadata": {"name": "demo-cloud-1-0", "namespace": running.name},
    }
    path = f"/api/v1/namespaces/{running.name}/pods/demo-cloud-1-0/eviction"
    kubectl("create", "--raw", path, "-f", "-", stdin=eviction)
    eventually(lambda: "demo-cloud-1-1" in running.running(), "the client is replaced")
    assert not running.events("ClientFailed")


def test_a_lost_aggregator_comes_back(running: Namespace) -> None:
    uid = running.get("pod", "demo-aggregator")["metadata"]["uid"]
    running.kubectl("delete", "pod", "demo-aggregator", "--wait=false")

    def replaced() -> bool:
        pod = running.get("pod", "demo-aggregator")
        return bool(pod) and pod["metadata"]["uid"] != uid and pod["status"].get("phase") == "Running"

    eventually(replaced, "a new aggregator runs")
    running.until("AggregatorReady", "True/AggregatorRunning")
    eventually(lambda: running.events("AggregatorLost"), "an event says so")
    # The clients keep running.
    assert running.running() >= PODS


def test_a_crash_of_the_aggregator_is_not_its_verdict(running: Namespace) -> None:
    running.touch("demo-aggregator", "/var/lib/isthmus/crash")

    def restarted() -> bool:
        statuses = running.get("pod", "demo-aggregator")["status"].get("containerStatuses") or [{}]
        return statuses[0].get("restartCount", 0) >= 1 and bool(statuses[0].get("ready"))

    eventually(restarted, "it runs again")
    running.until("AggregatorReady", "True/AggregatorRunning")
    assert running.condition("Failed") == ""


def test_the_aggregators_verdict_fails_the_job(running: Namespace) -> None:
    running.touch("demo-aggregator", "/var/lib/isthmus/fail")
    running.until("Failed", "True/AggregatorFailed")
    assert running.status()["message"] == "the models do not fit"
    eventually(lambda: running.events("AggregatorFailed"), "an event says so")
    eventually(lambda: not running.running(), "its pods end")
    assert running.names("persistentvolumeclaim") == {"demo-checkpoints"}


def test_suspend_and_resume(running: Namespace) -> None:
    running.kubectl("patch", "fj", "demo", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    running.until("Suspended", "True/SuspendedByUser")
    eventually(lambda: not running.names("pod"), "its pods are gone")
    claim = running.get("persistentvolumeclaim", "demo-checkpoints")["metadata"]["uid"]
    running.kubectl("patch", "fj", "demo", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    running.until("Suspended", "False/NotSuspended")
    wanted = {"demo-aggregator", "demo-cloud-0-1", "demo-cloud-1-1"}
    eventually(lambda: running.running() == wanted, "it runs again, with higher attempts")
    assert running.get("persistentvolumeclaim", "demo-checkpoints")["metadata"]["uid"] == claim


def test_an_operator_that_was_away_takes_up_where_things_are(running: Namespace, operator: Operator) -> None:
    before = {item["metadata"]["name"]: item["metadata"]["uid"] for item in running.items("pod")}
    secret = running.get("secret", "demo-cloud-tls")["data"]
    operator.kill()
    running.kubectl("delete", "pod", "demo-cloud-0-0", "--grace-period=0", "--force")
    operator.start()
    eventually(lambda: "demo-cloud-0-1" in running.running(), "the lost client is replaced")
    after = {item["metadata"]["name"]: item["metadata"]["uid"] for item in running.items("pod")}
    assert after["demo-aggregator"] == before["demo-aggregator"]
    assert after["demo-cloud-1-0"] == before["demo-cloud-1-0"]
    assert running.get("secret", "demo-cloud-tls")["data"] == secret


def test_a_steady_job_costs_no_writes(running: Namespace) -> None:
    eventually(lambda: "does not respond" in running.status().get("message", ""), "the stand-in was asked")
    version, since = "", time.monotonic()

    def steady() -> bool:
        nonlocal version, since
        seen = running.get("fj", "demo")["metadata"]["resourceVersion"]
        if seen != version:
            version, since = seen, time.monotonic()
        return time.monotonic() - since > 5  # a few reconcile passes

    eventually(steady, "nothing is written for 5 s")


def test_the_deadline_and_the_time_to_live(namespace: Namespace, operator: Operator) -> None:
    namespace.apply(manifest(activeDeadlineSeconds=5))
    namespace.until("Failed", "True/DeadlineExceeded")
    namespace.kubectl("patch", "fj", "demo", "--type=merge", "-p", '{"spec":{"ttlSecondsAfterFinished":1}}')
    eventually(lambda: not namespace.get("fj", "demo"), "the job is deleted")
    namespace.until_bare()


def test_a_quota_is_reported_and_waited_for(namespace: Namespace, operator: Operator) -> None:
    quota = {
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}, "spec": {"hard": {"pods": "2"}},
    }  # fmt: skip
    namespace.apply(quota)
    # Until the quota controller has counted usage, every pod is refused, and clients could be created before the
    # aggregator.
    hard = ("get", "resourcequota", "few", "-o", "jsonpath={.status.hard.pods}/{.status.used.pods}")
    eventually(lambda: namespace.kubectl(*hard) == "2/0", "the quota is in force")
    namespace.apply(manifest())
    eventually(lambda: "exceeded quota" in namespace.pool().get("reason", ""), "the quota is named")
    assert "demo-aggregator" in namespace.names("pod")
    namespace.kubectl("delete", "resourcequota", "few")
    eventually(lambda: namespace.running() >= PODS, "the last client starts", 240)


def test_a_missing_image_is_reported(namespace: Namespace, operator: Operator) -> None:
    job = manifest()
    job["spec"]["pools"][0]["cloud"]["template"] = pod_template("client")
    job["spec"]["pools"][0]["cloud"]["template"]["spec"]["containers"][0]["image"] = "isthmus.lab/absent:1"
    namespace.apply(job)
    eventually(lambda: "isthmus.lab/absent:1" in namespace.pool().get("reason", ""), "the image is named")


def test_what_belongs_to_others_is_left_alone(namespace: Namespace, operator: Operator) -> None:
    theirs = {
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "demo-cloud-tls"}, "stringData": {"mine": "yes"},
    }  # fmt: skip
    namespace.apply(theirs)
    namespace.apply(manifest())
    eventually(lambda: "Secret/demo-cloud-tls" in namespace.status().get("message", ""), "it is told")
    assert not namespace.names("pod")
    assert set(namespace.get("secret", "demo-cloud-tls")["data"]) == {"mine"}
    namespace.kubectl("delete", "secret", "demo-cloud-tls")
    eventually(lambda: namespace.running() >= PODS, "then the job starts", 180)


def test_what_was_deleted_by_hand_is_made_again(running: Namespace) -> None:
    running.kubectl("delete", "service", "demo-aggregator")
    running.kubectl("delete", "secret", "demo-observer-tls")
    eventually(
        lambda: running.names("service") == {"demo-aggregator"} and "demo-observer-tls" in running.names("secret"),
        "they are back",
        180,
    )
    assert running.running() >= PODS


def test_changes_that_need_a_new_job_are_ignored_and_reported(running: Namespace) -> None:
    running.kubectl("patch", "fj", "demo", "--type=merge", "-p", json.dumps({"spec": {"rounds": 9}}))
    words = "changes of spec.rounds are ignored: they need a new job"
    eventually(lambda: words in running.events("Valid"), "an event says so")
    assert running.status()["rounds"]["total"] == 3


def test_a_job_that_is_written_by_others_all_the_time(namespace: Namespace, operator: Operator) -> None:
    """The operator writes only if the object is unchanged (else 409), and then reads it again. Nothing is created
    twice."""
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            namespace.kubectl("annotate", "fj", "demo", f"example.com/n={number}", "--overwrite", check=False)

    def entries() -> list[list[int]]:
        """Return the operator's records of clients."""
        record = json.loads(namespace.get("fj", "demo")["metadata"]["annotations"].get("isthmus.dev/record", "{}"))
        return list(record.get("cloud", {}).get("cloud", {}).get("clients", {}).values())

    writers = [threading.Thread(target=write) for _ in range(2)]
    # Clients that end at once: each start is recorded before it happens.
    job = manifest(backoffLimit=20)
    job["spec"]["task"]["command"] = ["sh", "-c", "exit 3"]
    namespace.apply(job)
    try:
        for writer in writers:
            writer.start()
        eventually(lambda: 'code="409"' in operator.metrics(), "two write at the same time", 240)
        eventually(lambda: any(failures > 0 for _, failures, _ in entries()), "it comes on all the same", 240)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert namespace.condition("Accepted") == "True/Valid"
    # Each failure is counted once.
    for attempt, failures, counted in entries():
        assert failures == counted + 1
        assert attempt - counted in (0, 1)
    namespace.kubectl("delete", "fj", "demo", "--timeout=120s")
    namespace.until_bare()
