"""The webhook's reviews, which must equal the reconciler's."""

import datetime as dt
import json
import ssl
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_contracts.wire.pki import Authority
from isthmus_operator.planning.acceptance import Acceptance, Rejection, examine
from isthmus_operator.servers.admission import Answer, defaults, review_job, review_site
from isthmus_operator.servers.webhook import Webhook
from isthmus_operator.state.job_store import SiteStore
from isthmus_operator.state.observed import Observed
from tests.support.fake_cluster import UID, job, site, spec

NONE: frozenset[str] = frozenset()


def body(wanted: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    return {"metadata": {"name": "demo", "namespace": "team", "uid": UID, **metadata}, "spec": wanted}


def judge(wanted: dict[str, Any], old: dict[str, Any] | None = None, accepted: dict[str, Any] | None = None) -> Answer:
    spec_ = parse_spec(accepted) if accepted is not None else None
    return review_job(body(wanted), None if old is None else body(old), spec_, {"site": site()}, NONE)


def test_a_good_job_passes_silently() -> None:
    assert judge(spec(cloud=2, hpc=2)) == Answer(True)


@pytest.mark.parametrize(
    "bad",
    [
        spec(selection={"minClients": 9}),
        spec(rounds="x"),
        spec(strategy={"algorithm": "FedProx", "parameters": {"mu": "-1"}}),
        spec(pools=[{"name": "cloud", "cloud": {"template": {"spec": {"hostNetwork": True}}}}]),
        spec(pools=[{"name": "cloud", "cloud": {"template": {"spec": 3}}}]),
    ],
)
def test_the_reconciler_says_the_same(bad: dict[str, Any]) -> None:
    verdict = examine(job(bad), Observed(sites={"site": site()}), NONE)
    assert isinstance(verdict, Rejection)
    assert judge(bad) == Answer(False, f"{verdict.reason}: {verdict.message}")


def test_a_site_that_does_not_exist_yet_is_a_warning() -> None:
    wanted = spec(hpc=2)
    answer = review_job(body(wanted), None, None, {}, NONE)
    assert answer.allowed
    (warning,) = answer.warnings
    assert warning.startswith("SiteNotFound: spec.pools[1].hpc.siteRef.name: there is no HPCSite 'site'")


def test_changes_that_need_a_new_job_are_refused() -> None:
    answer = judge(spec(rounds=9), old=spec(), accepted=spec())
    assert answer == Answer(False, "changes of spec.rounds are refused: they need a new job")
    assert judge(spec(suspend=True), old=spec(), accepted=spec()) == Answer(True)
    # A return to the accepted spec, after a change that was ignored while the webhook was down.
    assert judge(spec(), old=spec(rounds=9), accepted=spec()) == Answer(True)
    # An operator that has just started knows from the status that the job was accepted.
    known = {**body(spec()), "status": {"conditions": [{"type": "Accepted", "status": "True"}]}}
    assert not review_job(body(spec(rounds=9)), known, None, {}, NONE).allowed
    broken = judge(spec(rounds=0), old=spec(), accepted=spec())
    assert not broken.allowed
    assert broken.message.startswith("the changed manifest is invalid and is refused: spec.rounds: ")


def test_changes_outside_the_spec_always_pass() -> None:
    bad = spec(rounds=0)
    assert judge(bad, old=bad) == Answer(True)
    going = body(spec(rounds=0), deletionTimestamp="2030-01-01T00:00:00Z")
    assert review_job(going, body(spec()), None, {}, NONE) == Answer(True)


def test_a_sites_manifest() -> None:
    good = {"endpoint": "h:1", "tls": {"secretRef": {"name": "a", "namespace": "b"}}, "allowedNamespaces": ["*"]}
    assert review_site({"spec": good}, None) == Answer(True)
    answer = review_site({"spec": {**good, "allowedNamespaces": []}}, {"spec": good})
    assert answer == Answer(False, "InvalidSpec: spec.allowedNamespaces: needs at least 1 item(s)")


def test_defaults_are_stored_and_change_no_verdict() -> None:
    wanted = spec(cloud=3)
    assert defaults(body(wanted)) == [
        {"op": "add", "path": "/spec/selection", "value": {"minClients": 2}},
        {"op": "add", "path": "/spec/stragglers", "value": {"minUpdates": 2}},
    ]
    assert defaults(body({**wanted, "selection": {"minClients": 3}, "stragglers": {}})) == [
        {"op": "add", "path": "/spec/stragglers/minUpdates", "value": 3}
    ]
    filled = {**wanted, "selection": {"minClients": 2}, "stragglers": {"minUpdates": 2}}
    assert defaults(body(filled)) == []
    assert parse_spec(filled).min_clients == parse_spec(wanted).min_clients
    assert defaults(body(spec(rounds=0))) == []


def test_the_users_own_manifest_is_accepted_after_the_defaults_were_stored() -> None:
    own = spec(cloud=3)
    stored = {**own, "selection": {"minClients": 2}, "stragglers": {"minUpdates": 2}}
    assert judge(own, old=stored, accepted=stored) == Answer(True)
    assert judge({**own, "suspend": True}, old=stored, accepted=stored) == Answer(True)
    # This also works in the other direction: the webhook was down when the job was created.
    assert judge(stored, old=own, accepted=own) == Answer(True)
    verdict = examine(job({**own, "suspend": True}), Observed(accepted=parse_spec(stored)))
    assert isinstance(verdict, Acceptance)
    assert (verdict.message, verdict.spec.suspend, verdict.spec.min_updates) == ("", True, 2)
    other = {**own, "selection": {"minClients": 3}}
    assert judge(other, old=stored, accepted=stored) == Answer(
        False, "changes of spec.selection are refused: they need a new job"
    )


async def call(webhook: Webhook, review: object, path: str, tmp: Path) -> dict[str, Any]:
    """Test the webhook over real TLS."""
    import asyncio
    import socket

    authority = Authority.create("ca", dt.timedelta(days=1))
    authority.issue("webhook", dt.timedelta(days=1), hosts=["127.0.0.1"]).write(tmp)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = ssl.create_default_context(cadata=authority.certificate.decode())
    task = asyncio.create_task(webhook.serve("127.0.0.1", port, tmp))

    def post() -> dict[str, Any]:
        request = urllib.request.Request(f"https://127.0.0.1:{port}{path}", json.dumps(review).encode())
        with urllib.request.urlopen(request, context=context, timeout=60) as answer:  # noqa: S310
            return dict(json.load(answer))

    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                return await asyncio.to_thread(post)
            except ConnectionError:
                await asyncio.sleep(0.05)
            except urllib.error.HTTPError as error:
                return {"code": error.code}
            except urllib.error.URLError:
                await asyncio.sleep(0.05)
        raise AssertionError("the webhook does not answer")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("served", [(), ("team",), ("other",)])
async def test_over_the_wire(served: tuple[str, ...], tmp_path: Path) -> None:
    webhook = Webhook(lambda *_: None, SiteStore(), NONE, served)
    request = {
        "uid": "u1", "operation": "CREATE", "namespace": "team", "name": "demo",
        "kind": {"kind": "FederatedJob"}, "object": body(spec(selection={"minClients": 9})),
    }  # fmt: skip
    answer = await call(webhook, {"request": request}, "/validate", tmp_path)
    response = answer["response"]
    assert (answer["kind"], response["uid"]) == ("AdmissionReview", "u1")
    assert response["allowed"] is ("other" in served)
    if not response["allowed"]:
        assert response["status"]["message"].startswith("InvalidSpec: spec.selection.minClients: 9 is more than")


async def test_an_excluded_namespace_is_another_operators(tmp_path: Path) -> None:
    webhook = Webhook(lambda *_: None, SiteStore(), NONE, excluded=frozenset({"team"}))
    request = {
        "uid": "u1", "operation": "CREATE", "namespace": "team", "name": "demo",
        "kind": {"kind": "FederatedJob"}, "object": body(spec(selection={"minClients": 9})),
    }  # fmt: skip
    answer = await call(webhook, {"request": request}, "/validate", tmp_path)
    assert answer["response"]["allowed"] is True


async def test_malformed_reviews_are_refused(tmp_path: Path) -> None:
    webhook = Webhook(lambda *_: None, SiteStore(), NONE)
    assert await call(webhook, {"no": "review"}, "/validate", tmp_path) == {"code": 400}
