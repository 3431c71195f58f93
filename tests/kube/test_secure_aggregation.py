"""Secure aggregation on a cluster: roots, keys and trust of cloud clients, and the condition."""

import base64
from typing import Any

from isthmus_contracts.identities import CREDENTIAL_FILE, SIGNING_KEY_FILE, TRUST_FILE
from isthmus_contracts.wire.parties import Credential, Signer, Trust, new_root, verify

from .bridge import FakeBridge
from .cluster import ACCOUNT, Namespace, Operator, eventually, manifest, read

RBAC = "rbac.authorization.k8s.io"
ROOT_NAME = "isthmus-signing-root"
SIGNING = {SIGNING_KEY_FILE, CREDENTIAL_FILE, TRUST_FILE}


def secure(namespace: Namespace, **settings: Any) -> dict[str, Any]:
    """Return a job with four pods and three clients of the site."""
    job = manifest(cloud=4, privacy={"secureAggregation": settings})
    job["spec"]["pools"].append(FakeBridge.pool(namespace.name, 3))
    container = job["spec"]["aggregator"]["template"]["spec"]["containers"][0]
    end = '"secure":{"round":3,"survivors":6,"dropouts":1,"parties":2}}'
    container["command"][-1] = container["command"][-1].replace('"sha256":"ab"}}', f'"sha256":"ab"}},{end}')
    return job


def keep_root_in(place: Namespace, namespace: Namespace, operator: Operator) -> None:
    """Restart the operator with its signing root in another namespace, and the rights that the documentation lists."""
    subject = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": namespace.name}
    rules = [
        {"apiGroups": [""], "resources": ["secrets"], "resourceNames": [ROOT_NAME], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]},
    ]
    meta = {"name": "signing-root", "namespace": place.name}
    ref = {"apiGroup": RBAC, "name": "signing-root", "kind": "Role"}
    place.apply(
        {"apiVersion": f"{RBAC}/v1", "kind": "Role", "metadata": meta, "rules": rules},
        {"apiVersion": f"{RBAC}/v1", "kind": "RoleBinding", "metadata": meta, "subjects": [subject], "roleRef": ref},
    )
    operator.stop()
    operator.options += ("--signing-root", f"{place.name}/{ROOT_NAME}", "--cluster", "prod-1")
    operator.start()


def files(namespace: Namespace, secret: str) -> dict[str, bytes]:
    data = namespace.get("secret", secret).get("data") or {}
    return {name: base64.b64decode(value) for name, value in data.items()}


def signing(site: str) -> dict[str, str]:
    """Return the roots that an HPCSite shows."""
    status = read(f"/apis/isthmus.dev/v1alpha1/hpcsites/{site}").get("status") or {}
    return dict(status.get("signing") or {})


def test_a_job_over_two_parties(
    namespace: Namespace, second: Namespace, operator: Operator, bridge: FakeBridge
) -> None:
    keep_root_in(second, namespace, operator)
    namespace.apply(secure(namespace, minParties=2))
    namespace.until("Accepted", "False/SigningRootMissing")
    message = f"HPCSite {namespace.name!r} has no signing root, which secure aggregation needs"
    assert message in namespace.status("demo")["message"]
    assert not namespace.get("secret", "demo-cloud-tls")

    # The site's admin makes a root, and its bridge reports it.
    bridge.signing_root = new_root()[1]
    namespace.until("Accepted", "True/Valid")
    eventually(lambda: "demo-cloud-3-0" in namespace.running(), "the pods run", 180)
    shown = signing(namespace.name)
    assert (shown["party"], shown["root"], shown["clusterParty"]) == ("fake", bridge.signing_root, "prod-1")

    data = files(namespace, "demo-cloud-tls")
    credential, trust = Credential.parse(data[CREDENTIAL_FILE]), Trust.parse(data[TRUST_FILE])
    Signer(data[SIGNING_KEY_FILE], credential)
    verify(credential, shown["clusterRoot"])
    assert (credential.party, credential.pool) == ("prod-1", "cloud")
    assert trust.roots == {"prod-1": shown["clusterRoot"], "fake": bridge.signing_root}
    assert (trust.required, trust.min_parties, trust.min_clients) == (True, 2, 3)
    listing = namespace.kubectl("exec", "demo-cloud-0-0", "--", "ls", "/etc/isthmus/tls")
    assert set(listing.split()) >= SIGNING

    # No key leaves the operator's namespace but those that the cluster's own clients sign with.
    assert not namespace.get("secret", ROOT_NAME)
    assert not SIGNING & {*files(namespace, "demo-aggregator-tls"), *files(namespace, "demo-lumi-tls")}
    eventually(lambda: bridge.requests, "the site is asked")
    asked = bridge.requests[0].spec.privacy
    assert (asked.secure_aggregation, asked.min_parties, asked.min_clients) == (True, 2, 3)

    namespace.until("SecurelyAggregated", "False/NoSumYet")
    namespace.kubectl("exec", "demo-aggregator", "--", "touch", "/var/lib/isthmus/complete")
    namespace.until("SecurelyAggregated", "True/SumOpened")
    (condition,) = (item for item in namespace.status("demo")["conditions"] if item["type"] == "SecurelyAggregated")
    assert condition["message"] == "round 3: 6 survivors, 1 dropout, 2 parties"


def test_the_root_outlives_the_operator_and_a_root_of_the_spec_takes_precedence(
    namespace: Namespace, second: Namespace, operator: Operator, bridge: FakeBridge
) -> None:
    keep_root_in(second, namespace, operator)
    bridge.signing_root = new_root()[1]
    eventually(lambda: "clusterRoot" in signing(namespace.name), "the roots are shown")
    before = files(second, ROOT_NAME)
    pinned = new_root()[1]
    namespace.kubectl(
        "patch", "hpcsite", namespace.name, "--type=merge", "-p", f'{{"spec":{{"signingRoot":"{pinned}"}}}}'
    )
    operator.kill()
    operator.start()
    namespace.apply(secure(namespace))
    namespace.until("Accepted", "True/Valid")
    eventually(lambda: TRUST_FILE in files(namespace, "demo-cloud-tls"), "the clients have a trust file")
    roots = Trust.parse(files(namespace, "demo-cloud-tls")[TRUST_FILE]).roots
    assert roots == {"prod-1": signing(namespace.name)["clusterRoot"], "fake": pinned}
    assert files(second, ROOT_NAME) == before

    def told() -> str:
        status = read(f"/apis/isthmus.dev/v1alpha1/hpcsites/{namespace.name}").get("status") or {}
        return str(status.get("message") or "")

    eventually(lambda: "another signing root" in told(), "the difference is shown")


def test_without_a_place_for_the_root_the_job_waits(namespace: Namespace, operator: Operator) -> None:
    job = manifest(cloud=4, privacy={"secureAggregation": {}})
    namespace.apply(job)
    namespace.until("Accepted", "False/SigningRootMissing")
    assert "start it with --signing-root NAMESPACE/NAME" in namespace.status("demo")["message"]
    assert not namespace.running()
