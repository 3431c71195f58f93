"""Renewal of certificates while jobs run: the job's, the site's and the webhook's."""

import base64
import datetime as dt
import json
from pathlib import Path
from typing import Any

from cryptography import x509

from isthmus_contracts.wire.pki import Authority
from isthmus_operator.effects import certificates
from isthmus_operator.state.job_store import parse_job

from .bridge import FakeBridge
from .cluster import Namespace, Operator, eventually, kubectl, manifest
from .test_sites import reachable

PODS = {"demo-aggregator", "demo-cloud-0-0", "demo-cloud-1-0"}
DAY = dt.timedelta(days=1)


def pem(namespace: Namespace, secret: str, key: str = "tls.crt") -> bytes:
    return base64.b64decode((namespace.get("secret", secret).get("data") or {}).get(key, ""))


def remaining_validity(certificate: bytes) -> dt.timedelta:
    """Return the remaining validity of a certificate."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc - dt.datetime.now(dt.UTC)


def uids(namespace: Namespace) -> dict[str, str]:
    return {item["metadata"]["name"]: item["metadata"]["uid"] for item in namespace.items("pod")}


def test_a_jobs_authority_is_renewed_and_no_pod_notices(
    namespace: Namespace, operator: Operator, bridge: FakeBridge
) -> None:
    job = manifest()
    job["spec"]["pools"].append(FakeBridge.pool(namespace.name))
    namespace.apply(job)
    eventually(lambda: namespace.running() >= PODS, "the pods run", 180)
    eventually(lambda: namespace.pool("lumi").get("jobs") == ["8000"], "the pool is there")
    before, secret = uids(namespace), namespace.get("secret", "demo-ca")
    authority = certificates.load_authority(secret)
    assert authority is not None
    first = pem(namespace, "demo-cloud-tls", "0.crt")
    # Simulate a CA that was created long ago and has ten days left.
    old = certificates.renewed_authority_secret(
        parse_job(namespace.get("fj", "demo")), "demo-ca", authority, certificates.fingerprint(secret, authority), 10,
        dt.datetime.now(dt.UTC),
    )  # fmt: skip
    namespace.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=old)
    eventually(lambda: remaining_validity(pem(namespace, "demo-ca")) > 300 * DAY, "the CA is renewed", 240)
    for name in ("demo-cloud-tls", "demo-lumi-tls", "demo-aggregator-tls", "demo-observer-tls"):
        newest = pem(namespace, "demo-ca").strip()
        eventually(lambda n=name, c=newest: pem(namespace, n, "ca.crt").strip() == c, f"{name} is made anew")  # type: ignore[misc]
    # The site gets it too, for the array that exists already.
    eventually(lambda: bridge.renewed, "the site is told", 240)
    (request,) = bridge.requests
    (renewal,) = bridge.renewed.values()
    assert renewal.key == request.key
    assert renewal.certificate == pem(namespace, "demo-lumi-tls") != request.spec.federation.certificate
    # The kubelet updates it in the pods, which are unchanged.
    newest = pem(namespace, "demo-cloud-tls", "0.crt")
    assert newest != first

    def mounted() -> str:
        return namespace.kubectl("exec", "demo-cloud-0-0", "--", "cat", "/etc/isthmus/tls/tls.crt", check=False)

    eventually(lambda: mounted().strip() == newest.decode().strip(), "the client's pod has it", 600, every=5.0)
    assert uids(namespace) == before
    # The next operator neither renews anything nor sends certificates to the site again.
    operator.kill()
    bridge.renewed.clear()
    calls = bridge.get_calls
    operator.start()
    eventually(lambda: bridge.get_calls >= calls + 3, "the site is asked")
    assert not bridge.renewed
    assert pem(namespace, "demo-cloud-tls", "0.crt") == newest
    assert uids(namespace) == before
    namespace.kubectl("delete", "fj", "demo", "--timeout=120s")


def test_a_sites_new_certificates_are_taken_up(namespace: Namespace, operator: Operator, bridge: FakeBridge) -> None:
    eventually(lambda: reachable(namespace.name) == "True/SiteReachable", "the site is reachable")
    assert operator.process is not None
    pid = operator.process.pid
    bridge.down()
    bridge.new_certificates()
    bridge.up()
    eventually(lambda: reachable(namespace.name) == "False/SiteUnreachable", "the operator does not trust it", 180)
    namespace.apply(bridge.secret())
    eventually(lambda: reachable(namespace.name) == "True/SiteReachable", "it has read the Secret anew", 240)
    assert operator.process.pid == pid
    assert operator.process.poll() is None


def test_the_webhooks_new_certificate_is_taken_up(
    namespace: Namespace, operator: Operator, webhook: None, tmp_path: Path
) -> None:
    authority = Authority.create("another", DAY)
    authority.issue("webhook", DAY, hosts=["127.0.0.1"]).write(tmp_path / "webhook")
    bundle = base64.b64encode(authority.certificate).decode()
    for kind, end in (("mutating", "default"), ("validating", "validate")):
        patch = [{"op": "replace", "path": "/webhooks/0/clientConfig/caBundle", "value": bundle}]
        kubectl("patch", f"{kind}webhookconfiguration", f"{namespace.name}-{end}", "--type=json", "-p",
                json.dumps(patch))  # fmt: skip
    bad: dict[str, Any] = manifest("probe")
    bad["spec"]["pools"][0]["name"] = "observer"
    # Until the API server trusts the new CA, it cannot call the webhook and admits the object.
    eventually(
        lambda: "denied the request" in namespace.kubectl("create", "--dry-run=server", "-f", "-", stdin=bad,
                                                          check=False),
        "the API server trusts the new certificate, and the operator shows it", 180,
    )  # fmt: skip
    assert "renewed" in operator.log.read_text(encoding="utf-8")
