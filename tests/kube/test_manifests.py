"""Bad manifests: the messages of `kubectl apply`, and those of the operator for faults that a schema cannot express."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from .cluster import ROOT, Namespace, Operator, eventually, manifest

Spoil = Callable[[dict[str, Any]], object]


def _pod(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the clients' pod template."""
    template: dict[str, Any] = spec["pools"][0]["cloud"]["template"]["spec"]
    return template


def _hpc(name: str = "lumi") -> dict[str, Any]:
    return {"name": name, "hpc": {"siteRef": {"name": "no-such-site"}, "environment": "py"}}


SECURE: dict[str, Any] = {"privacy": {"secureAggregation": {}}}
NOISE = {"clipNorm": "1", "noiseMultiplier": "1", "noise": "Distributed"}


def _many(spec: dict[str, Any]) -> dict[str, Any]:
    """Give the pool six clients."""
    spec["pools"][0]["replicas"] = 6
    return spec


# Each case: the fault, a function that puts it into a good manifest, and a part of the message.
SCHEMA: list[tuple[str, Spoil, str]] = [
    ("unknown algorithm", lambda s: s.update(strategy={"algorithm": "FedMagic"}), "spec.strategy.algorithm"),
    ("zero rounds", lambda s: s.update(rounds=0), "spec.rounds"),
    ("no rounds", lambda s: s.pop("rounds"), "rounds"),
    ("no task", lambda s: s.pop("task"), "task"),
    ("empty command", lambda s: s["task"].update(command=[]), "spec.task.command"),
    ("both worlds", lambda s: s["pools"][0].update(hpc=_hpc()["hpc"]), "spec.pools"),
    ("neither world", lambda s: s["pools"][0].pop("cloud"), "spec.pools"),
    ("no pools", lambda s: s.update(pools=[]), "spec.pools"),
    ("duplicate pool name", lambda s: s["pools"].append(copy.deepcopy(s["pools"][0])), "spec.pools[1]"),
    ("no replicas", lambda s: s["pools"][0].update(replicas=0), "spec.pools.replicas"),
    ("bad number in parameters",
     lambda s: s.update(strategy={"algorithm": "FedProx", "parameters": {"mu": "lots"}}),
     "spec.strategy.parameters.mu"),
    ("number that is no string",
     lambda s: s.update(strategy={"algorithm": "FedProx", "parameters": {"mu": 0.1}}), "spec.strategy.parameters.mu"),
    ("a path as environment", lambda s: s["pools"].append(_hpc() | {"hpc": {**_hpc()["hpc"], "environment": "/opt/x"}}),
     "spec.pools.hpc.environment"),
    ("an option as partition", lambda s: s["pools"].append(_hpc() | {"hpc": {**_hpc()["hpc"], "partition": "--wrap"}}),
     "spec.pools.hpc.partition"),
    ("bits of another size", lambda s: s.update(privacy={"secureAggregation": {"bits": 24}}),
     "spec.privacy.secureAggregation.bits"),
    ("unknown storage", lambda s: s["aggregator"].update(checkpoint={"storage": "Tape"}), "spec.aggregator.checkpoint"),
]  # fmt: skip

# Faults that a schema cannot express, with the reason and the whole message that the operator shows.
REJECTED: list[tuple[str, Spoil, str, str]] = [
    ("minClients above the total", lambda s: s.update(selection={"minClients": 5}), "InvalidSpec",
     "spec.selection.minClients: 5 is more than the 2 clients of all pools; it could never start"),
    ("unknown parameter", lambda s: s.update(strategy={"algorithm": "FedAvg", "parameters": {"mu": "1"}}),
     "InvalidSpec", "spec.strategy.parameters.mu: unknown for FedAvg; it takes none"),
    ("negative mu", lambda s: s.update(strategy={"algorithm": "FedProx", "parameters": {"mu": "-1"}}), "InvalidSpec",
     "spec.strategy.parameters.mu: must be at least 0, not -1"),
    ("fraction above one", lambda s: s.update(selection={"fraction": "1.5"}), "InvalidSpec",
     "spec.selection.fraction: must be above 0 and at most 1, not 1.5"),
    ("reserved variable", lambda s: s["task"].update(env=[{"name": "ISTHMUS_INDEX", "value": "1"}]), "InvalidSpec",
     "spec.task.env[0].name: names that begin with ISTHMUS_ are reserved for Isthmus"),
    ("unknown site", lambda s: s["pools"].append(_hpc()), "SiteNotFound",
     "spec.pools[1].hpc.siteRef.name: there is no HPCSite 'no-such-site'; see kubectl get hpcsites"),
    ("a template that is none", lambda s: s["pools"][0]["cloud"].update(template={"spec": {"containers": "x"}}),
     "InvalidSpec", "spec.pools[0].cloud.template.spec.containers: must be a list"),
    ("a path of the node", lambda s: _pod(s).update(volumes=[{"name": "x", "hostPath": {"path": "/etc"}}]),
     "TemplateNotAllowed", "spec.pools[0].cloud.template.spec.volumes[x].hostPath: a volume of type hostPath is not"
     " allowed here; the platform's admin can allow host-path (operator.allowInTemplates)"),
    ("the node's network", lambda s: _pod(s).update(hostNetwork=True), "TemplateNotAllowed",
     "spec.pools[0].cloud.template.spec.hostNetwork: hostNetwork is not allowed here; the platform's admin can allow"
     " host-namespaces (operator.allowInTemplates)"),
    ("a privileged container", lambda s: _pod(s)["containers"][0].update(securityContext={"privileged": True}),
     "TemplateNotAllowed", "spec.pools[0].cloud.template.spec.containers[client].securityContext.privileged: privileged"
     " is not allowed here; the platform's admin can allow privileged (operator.allowInTemplates)"),
    ("another service account", lambda s: s["aggregator"]["template"]["spec"].update(serviceAccountName="builder"),
     "TemplateNotAllowed", "spec.aggregator.template.spec.serviceAccountName: the service account 'builder' is not"
     " allowed here; the platform's admin can allow service-account (operator.allowInTemplates)"),
    ("secure aggregation of two clients", lambda s: s.update(SECURE), "InvalidSpec",
     "spec.pools: privacy.secureAggregation needs at least 3 clients that train, and there may be only 2: with two,"
     " each could compute the other's update from the sum; raise replicas"),
    ("secure aggregation with a rule for single updates",
     lambda s: s.update(SECURE, strategy={"algorithm": "CoordinateMedian"}), "InvalidSpec",
     "spec.strategy.algorithm: CoordinateMedian does not go with privacy.secureAggregation: it compares single updates,"
     " and only their sum is opened; use FedAvg, FedProx, FedAvgM, FedAdagrad, FedAdam, FedYogi, FedNova or SCAFFOLD"),
    ("secure aggregation with a codec", lambda s: _many(s).update(SECURE, compression={"upload": "Int8"}),
     "InvalidSpec", "spec.compression.upload: Int8 does not go with privacy.secureAggregation: the scales of Int8"
     " depend on the data and are sent in clear; use privacy.secureAggregation.bits 16 or keep"),
    ("secure aggregation with too few updates", lambda s: _many(s).update(SECURE, stragglers={"minUpdates": 2}),
     "InvalidSpec", "spec.stragglers.minUpdates: 2 is too few for privacy.secureAggregation: of 3 clients"
     " (selection.minClients), more than two thirds and at least 3 must hand in; raise it to 3, or leave it out"),
    ("secure aggregation of an unknown metric", lambda s: _many(s).update(SECURE, objective={"metric": "f1"}),
     "InvalidSpec", "spec.privacy.secureAggregation.metrics: has no bound for objective.metric, f1; add its largest"
     ' absolute value, such as f1: "1"'),
    ("distributed noise without secure aggregation", lambda s: s.update(privacy={"differentialPrivacy": NOISE}),
     "InvalidSpec", "spec.privacy.differentialPrivacy.noise: Distributed needs privacy.secureAggregation, as a client's"
     " share of the noise does not protect its update alone; add secureAggregation: {}, or use Aggregator"),
    ("a taken pool name", lambda s: s["pools"][0].update(name="observer"), "InvalidSpec",
     "spec.pools[0].name: 'observer' is reserved"),
]  # fmt: skip


# The webhook does not refuse these: only the platform's admin can fix them.
WAITS = {"unknown site"}
DOCUMENT = ROOT / "docs" / "training" / "manifest-errors.md"


def spoiled(spoil: Spoil, name: str = "demo") -> dict[str, Any]:
    job = copy.deepcopy(manifest(name))
    spoil(job["spec"])
    return job


@pytest.mark.parametrize(("spoil", "message"), [case[1:] for case in SCHEMA], ids=[case[0] for case in SCHEMA])
def test_the_api_server_refuses(bare: Namespace, spoil: Spoil, message: str) -> None:
    said = bare.apply(spoiled(spoil), check=False)
    assert message in said, said
    assert not bare.get("fj", "demo")


def test_the_operator_rejects_what_a_schema_lets_pass(namespace: Namespace, operator: Operator) -> None:
    names = [f"bad-{number}" for number in range(len(REJECTED))]
    jobs = [spoiled(spoil, name) for name, (_, spoil, _, _) in zip(names, REJECTED, strict=True)]
    namespace.apply(*jobs, manifest("a.b"))
    for name, (what, _, reason, message) in zip(names, REJECTED, strict=True):
        namespace.until("Accepted", f"False/{reason}", name)
        assert namespace.status(name)["message"] == message, what
        assert namespace.status(name)["phase"] == "Rejected"
    namespace.until("Accepted", "False/InvalidSpec", "a.b")
    assert not namespace.leftovers()


def test_the_webhook_refuses_it_when_it_is_applied(namespace: Namespace, operator: Operator, webhook: None) -> None:
    for what, spoil, reason, message in REJECTED:
        said = namespace.apply(spoiled(spoil), check=False)
        assert f"{reason}: {message}" in said, what
        assert bool(namespace.get("fj", "demo")) is (what in WAITS)
        if what in WAITS:
            assert f"Warning: {reason}: {message}; the job waits for it" in said
            namespace.kubectl("delete", "fj", "demo", "--timeout=120s")
    # A valid manifest is admitted, and derived defaults are stored.
    namespace.apply(manifest())
    assert namespace.get("fj", "demo")["spec"]["selection"]["minClients"] == 2
    namespace.until("Accepted", "True/Valid")
    said = namespace.kubectl("patch", "fj", "demo", "--type=merge", "-p", '{"spec":{"rounds":9}}', check=False)
    assert "changes of spec.rounds are refused: they need a new job" in said
    namespace.kubectl("patch", "fj", "demo", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    # If the webhook is down, manifests are admitted; the reconciler reports the same message in the status.
    operator.kill()
    namespace.apply(spoiled(REJECTED[0][1], "bad"))
    operator.start()
    namespace.until("Accepted", f"False/{REJECTED[0][2]}", "bad")
    assert namespace.status("bad")["message"] == REJECTED[0][3]


def test_every_bad_manifest_is_documented_with_its_message() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [what for what, _, _ in SCHEMA if f"| {what} |" not in text] == []
    for what, _, reason, message in REJECTED:
        assert f"| {what} | `{reason}: {message}" in text, what


def test_a_corrected_manifest_is_picked_up(namespace: Namespace, operator: Operator) -> None:
    namespace.apply(spoiled(lambda s: s.update(selection={"minClients": 5})))
    namespace.until("Accepted", "False/InvalidSpec")
    namespace.apply(manifest())
    namespace.until("Accepted", "True/Valid")
    eventually(lambda: "demo-aggregator" in namespace.running(), "it runs")


def test_the_table_and_the_explanation(namespace: Namespace, operator: Operator) -> None:
    namespace.apply(manifest())
    namespace.until("Accepted", "True/Valid")
    header, row = namespace.kubectl("get", "federatedjobs").splitlines()
    assert header.split() == ["NAME", "PHASE", "ROUND", "ROUNDS", "CLIENTS", "BEST", "AGE"]
    assert row.split()[0] == "demo"
    # The API server publishes the text of kubectl explain a while after the resource itself.
    eventually(
        lambda: "Number of rounds" in namespace.kubectl("explain", "fj.spec.rounds", check=False), "it is explained"
    )
    assert "demo" in namespace.kubectl("get", "federated", "-o", "name")
