"""Tests of references in templates to other jobs' objects and to objects that the admin does not allow."""

from dataclasses import replace
from typing import Any

import pytest

from isthmus_contracts import identities as ids
from isthmus_contracts.api.federated_job_status import Reason
from isthmus_contracts.manifests.manifest import parse_site_spec
from isthmus_operator.effects import code, dependents
from isthmus_operator.planning.acceptance import Acceptance, Rejection, examine
from isthmus_operator.render.references import not_allowed, references
from isthmus_operator.state.job_store import SiteStore
from tests.support.fake_cluster import UID, job, spec, standing

OTHER = "11111111-0000-4000-8000-000000000002"


def pod(**fields: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "client", **fields}]}}


def volume(**source: Any) -> dict[str, Any]:
    return {"spec": {"volumes": [{"name": "loot", **source}]}}


WAYS = [
    volume(secret={"secretName": "victim-ca"}),
    volume(projected={"sources": [{"secret": {"name": "victim-ca"}}]}),
    volume(csi={"driver": "d", "nodePublishSecretRef": {"name": "victim-ca"}}),
    pod(env=[{"name": "LOOT", "valueFrom": {"secretKeyRef": {"name": "victim-ca", "key": "tls.key"}}}]),
    pod(envFrom=[{"secretRef": {"name": "victim-ca"}}]),
    {"spec": {"initContainers": [{"name": "i", "envFrom": [{"secretRef": {"name": "victim-ca"}}]}]}},
]


class Kube:
    """A fake API server with objects by kind and name."""

    def __init__(self, **labels: dict[str, str] | None) -> None:
        self.labels = labels

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        if name not in self.labels:
            return None
        return {"metadata": {"name": name, "labels": self.labels[name]}}


def ours(uid: str = OTHER) -> dict[str, str]:
    return {ids.LABEL_MANAGED_BY: ids.MANAGED_BY, ids.LABEL_JOB_UID: uid}


def with_template(template: dict[str, Any]) -> dict[str, Any]:
    return spec(pools=[{"name": "cloud", "replicas": 2, "cloud": {"template": template}}])


async def refused(kube: Kube, template: dict[str, Any], sites: SiteStore | None = None) -> tuple[str, ...]:
    wanted = with_template(template)
    return await dependents.forbidden_references(kube, job(wanted), None, sites or SiteStore())  # type: ignore[arg-type]


@pytest.mark.parametrize("template", WAYS)
async def test_another_jobs_key_is_refused_whichever_way_it_is_named(template: dict[str, Any]) -> None:
    kube = Kube(**{"victim-ca": ours()})
    (said,) = await refused(kube, template)
    assert said.startswith("spec.pools[0].cloud.template.spec.")
    assert said.endswith("the Secret 'victim-ca' is Isthmus' own: no template may name it")
    # An object that does not exist yet may be created for another job.
    (early,) = await refused(Kube(), template)
    assert "does not exist, and its name is reserved for Isthmus' own objects" in early
    # A user's own object with a reserved name is allowed.
    assert await refused(Kube(**{"victim-ca": None}), template) == ()


@pytest.mark.parametrize(
    ("source", "name"),
    [({"configMap": {"name": "victim-log"}}, "victim-log"), ({"configMap": {"name": "victim-code"}}, "victim-code"),
     ({"persistentVolumeClaim": {"claimName": "victim-checkpoints"}}, "victim-checkpoints")],
)  # fmt: skip
async def test_so_are_another_jobs_logs_files_and_model(source: dict[str, Any], name: str) -> None:
    assert len(await refused(Kube(**{name: ours()}), volume(**source))) == 1
    assert len(await refused(Kube(), volume(**source))) == 1
    assert await refused(Kube(**{name: ours(UID)}), volume(**source)) == ()


async def test_a_jobs_own_key_is_no_templates_either_and_its_own_claim_may_be_named_before_it_is_there() -> None:
    assert len(await refused(Kube(**{"demo-ca": ours(UID)}), volume(secret={"secretName": "demo-ca"}))) == 1
    assert await refused(Kube(), volume(persistentVolumeClaim={"claimName": "demo-checkpoints"})) == ()


async def test_a_sites_credentials_and_the_operators_own_are_refused() -> None:
    sites = SiteStore()
    secret = {"name": "lumi", "namespace": "team"}
    content = {"endpoint": "b:1", "tls": {"secretRef": secret}, "allowedNamespaces": ["*"]}
    parse_site_spec(content)
    sites.put({"metadata": {"name": "lumi", "resourceVersion": "1"}, "spec": content})
    (said,) = await refused(Kube(lumi=None), volume(secret={"secretName": "lumi"}), sites)
    assert "holds a site's credentials" in said
    webhook = {"app.kubernetes.io/name": "isthmus"}
    assert len(await refused(Kube(hook=webhook), volume(secret={"secretName": "hook"}))) == 1


def test_it_reaches_the_verdict_also_of_a_job_that_was_accepted() -> None:
    said = "spec.aggregator.template.x: the Secret 'victim-ca' is Isthmus' own: no template may name it"
    for observed in (
        standing(forbidden_references=(said,)),
        replace(standing(forbidden_references=(said,)), accepted=None),
    ):
        assert examine(job(), observed) == Rejection(Reason.TEMPLATE_NOT_ALLOWED, said, waits=True)


def test_the_admin_limits_the_names_that_templates_may_use() -> None:
    template = pod(envFrom=[{"secretRef": {"name": "wandb"}}, {"configMapRef": {"name": "settings"}}])
    assert not list(not_allowed(template, frozenset({"host-path"})))
    assert not list(not_allowed(template, frozenset({"secret=wan*", "config-map=settings"})))
    (said,) = not_allowed(template, frozenset({"secret=other"}))
    assert said.endswith(
        "the Secret 'wandb' is not allowed here; the platform's admin can allow it (--secrets-in-templates)"
    )
    wanted = spec(task={"image": "i", "command": ["c"], "code": {"configMapRef": {"name": "files"}}})
    observed = replace(standing(wanted), accepted=None)
    assert isinstance(examine(job(wanted), observed, frozenset({"config-map=files"})), Acceptance)
    verdict = examine(job(wanted), observed, frozenset({"config-map=other"}))
    assert isinstance(verdict, Rejection)
    assert verdict.message.startswith("spec.task.code.configMapRef.name: the ConfigMap 'files' is not allowed here")


def test_another_jobs_files_are_not_copied() -> None:
    said = code.copy(job(), "victim-log", {"metadata": {"labels": ours()}, "data": {"log": "secret"}})
    assert said == "spec.task.code: ConfigMap 'victim-log' is Isthmus' own: another job's files or logs are not copied"


def test_any_nonsense_names_nothing() -> None:
    for template in (None, 5, [], [None], {"secret": 5}, {"secret": {"name": 5}}, {"env": [{"secretKeyRef": []}]}):
        assert list(references(template)) == []
