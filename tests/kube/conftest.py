"""Fixtures: CRDs, a namespace per test, the operator in it, and a bridge that the test controls."""

import base64
import datetime as dt
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from isthmus_contracts.wire.pki import Authority
from tests.support.ports import free_port

from .bridge import FakeBridge
from .cluster import (
    ACCOUNT,
    ROOT,
    Namespace,
    Operator,
    documented_rules,
    eventually,
    grant,
    kubeconfig,
    kubectl,
    manifest,
    remove_site,
)

RBAC = "rbac.authorization.k8s.io"
CRDS = ("federatedjobs.isthmus.dev", "hpcsites.isthmus.dev")


_made: list[str] = []


@pytest.fixture(scope="session")
def crds(require: Callable[[bool, str], None]) -> None:
    """Install the CRDs and wait until the cluster serves them."""
    present = bool(os.environ.get("KUBECONFIG")) and shutil.which("kubectl") is not None
    require(present, "no cluster: run `python -m lab exec -- pytest tests/kube`, or set KUBECONFIG")
    before = kubectl("get", "crd", "-o", "name", check=False)
    if "PYTEST_XDIST_WORKER" not in os.environ:  # with xdist, others may need them
        _made.extend(name for name in CRDS if name not in before)
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    for name in CRDS:
        kubectl("wait", "--for=condition=Established", "--timeout=120s", f"crd/{name}")
    plurals = [name.split(".")[0] for name in CRDS]

    def discovered() -> bool:
        said = kubectl("api-resources", "--api-group=isthmus.dev", check=False)
        return all(plural in said for plural in plurals)

    eventually(discovered, "discovery")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Raise the time limit: each wait has its own deadline, and their sum is larger than for other tests.

    Run the longest test first, so that it is not the last to end when several run in parallel.
    """
    places = [place for place, item in enumerate(items) if Path(__file__).parent in item.path.parents]
    ours = [items[place] for place in places]
    for item in ours:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))
    for place, item in zip(places, sorted(ours, key=lambda item: item.path.stem != "test_soak"), strict=True):
        items[place] = item


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Remove the CRDs that the tests created, before tests elsewhere install the chart with its own CRDs."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        while _made:
            kubectl("delete", "crd", _made.pop(), "--timeout=240s")


@contextmanager
def made_namespace() -> Iterator[Namespace]:
    """Create a namespace, and delete it with its contents at the end."""
    name = f"kube-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    space = Namespace(name)
    # Some Kubernetes versions admit pods only once it exists.
    eventually(lambda: space.get("serviceaccount", "default"), "the default service account")
    try:
        yield space
    finally:
        for job in json.loads(space.kubectl("get", "fj", "-o", "json"))["items"]:
            free = {"metadata": {"finalizers": None}}
            space.kubectl("patch", "fj", job["metadata"]["name"], "--type=merge", "-p", json.dumps(free), check=False)
        space.kubectl("delete", "pods", "--all", "--grace-period=0", "--force", check=False)
        kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")


@pytest.fixture
def namespace(crds: None) -> Iterator[Namespace]:
    """Yield a namespace for one test."""
    with made_namespace() as space:
        yield space


@pytest.fixture(scope="module")
def bare(crds: None) -> Iterator[Namespace]:
    """Yield a namespace for tests that leave nothing in it and need no operator."""
    with made_namespace() as space:
        yield space


@pytest.fixture
def operator(namespace: Namespace, tmp_path: Path) -> Iterator[Operator]:
    """Yield the operator, running with exactly the rights that the documentation lists."""
    wide = grant(namespace.name)
    process = Operator(namespace.name, kubeconfig(namespace.name, tmp_path / "kubeconfig"), tmp_path / "operator.log")
    try:
        process.start()
        yield process
    finally:
        process.stop()
        print(process.log.read_text(encoding="utf-8"))
        kubectl("delete", "clusterrole,clusterrolebinding", wide)


@pytest.fixture
def second(crds: None) -> Iterator[Namespace]:
    with made_namespace() as space:
        yield space


@pytest.fixture
def both(namespace: Namespace, second: Namespace, tmp_path: Path) -> Iterator[Operator]:
    """Yield an operator in one namespace that also serves the other one, as scope.type=Namespaces sets it up."""
    wide = grant(namespace.name)
    meta = {"name": ACCOUNT, "namespace": second.name}
    subjects = [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": namespace.name}]
    ref = {"apiGroup": RBAC, "name": ACCOUNT, "kind": "Role"}
    second.apply(
        {"apiVersion": f"{RBAC}/v1", "kind": "Role", "metadata": meta, "rules": documented_rules()["served"]},
        {"apiVersion": f"{RBAC}/v1", "kind": "RoleBinding", "metadata": meta, "subjects": subjects, "roleRef": ref},
    )
    account = f"--as=system:serviceaccount:{namespace.name}:{ACCOUNT}"
    eventually(
        lambda: "yes" in kubectl("auth", "can-i", "list", "pods", "-n", second.name, account, check=False).split(),
        "the rights in the second namespace hold",
    )
    process = Operator(namespace.name, kubeconfig(namespace.name, tmp_path / "kubeconfig"), tmp_path / "operator.log")
    process.options = ("--namespace", second.name)
    try:
        process.start()
        yield process
    finally:
        process.stop()
        print(process.log.read_text(encoding="utf-8"))
        kubectl("delete", "clusterrole,clusterrolebinding", wide)


@pytest.fixture
def bridge(namespace: Namespace) -> Iterator[FakeBridge]:
    """Yield the bridge of an HPC site named like the namespace; the test controls it."""
    with FakeBridge() as fake:
        namespace.apply(fake.secret())
        kubectl("apply", "-f", "-", stdin=fake.site(namespace.name))
        yield fake
    remove_site(namespace.name)


@pytest.fixture
def webhook(namespace: Namespace, operator: Operator, tmp_path: Path) -> Iterator[None]:
    """Enable the operator's admission webhook for the test's namespace, as the chart sets it up."""
    authority = Authority.create("webhook", dt.timedelta(days=1))
    authority.issue("webhook", dt.timedelta(days=1), hosts=["127.0.0.1"]).write(tmp_path / "webhook")
    address = f"127.0.0.1:{free_port()}"
    operator.stop()
    operator.options += ("--webhook", address, "--webhook-tls", str(tmp_path / "webhook"))
    operator.start()
    bundle = base64.b64encode(authority.certificate).decode()
    # The webhook must not be called for other tests' namespaces.
    selector = {"matchLabels": {"isthmus.dev/test": namespace.name}}
    kubectl("label", "namespace", namespace.name, f"isthmus.dev/test={namespace.name}")
    kinds = {"MutatingWebhookConfiguration": "default", "ValidatingWebhookConfiguration": "validate"}
    chart = yaml.safe_load_all(
        subprocess.run(
            ["helm", "template", "isthmus", ROOT / "charts" / "isthmus", "--show-only", "templates/webhook.yaml"],
            capture_output=True, check=True, text=True,
        ).stdout
    )  # fmt: skip
    objects = [item for item in chart if item and item["kind"] in kinds]
    for item in objects:
        item["metadata"] = {"name": f"{namespace.name}-{kinds[item['kind']]}"}
        (hook,) = item["webhooks"]
        hook["clientConfig"] = {"url": f"https://{address}/{kinds[item['kind']]}", "caBundle": bundle}
        hook["namespaceSelector"] = selector
        hook["rules"][0]["scope"] = "Namespaced"
        # If the webhook does not answer in time, the object is admitted.
        hook["timeoutSeconds"] = 30
    names = [f"{item['kind']}/{item['metadata']['name']}" for item in objects]
    kubectl("create", "-f", "-", stdin={"apiVersion": "v1", "kind": "List", "items": objects})
    try:
        bad = manifest("probe")
        bad["spec"]["pools"][0]["name"] = "observer"

        def active() -> bool:
            said = namespace.kubectl("create", "--dry-run=server", "-f", "-", stdin=bad, check=False)
            return "denied the request" in said

        eventually(active, "the API server asks the webhook")
        yield
    finally:
        kubectl("delete", *names)
