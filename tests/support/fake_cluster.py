"""A simulated cluster and HPC site, in which plans are carried out."""

import copy
import datetime as dt
import json
from dataclasses import replace
from typing import Any

from isthmus_contracts import identities as ids
from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.api.hpc_site import HpcSiteSpec
from isthmus_contracts.manifests.manifest import parse_site_spec, parse_spec
from isthmus_operator import names
from isthmus_operator.planning import actions as act
from isthmus_operator.planning import desired
from isthmus_operator.planning import plan as planning
from isthmus_operator.planning.context import PlanOptions
from isthmus_operator.planning.status import merge_patch
from isthmus_operator.render import hpc as render_hpc
from isthmus_operator.state.job_record import ArrayRecord, ArrayState, Record, Submission
from isthmus_operator.state.observed import (
    FederationView,
    Job,
    Observed,
    PodView,
    PoolPhase,
    PoolProblem,
    PoolView,
    ProblemKind,
    Refusal,
    ServiceView,
)
from isthmus_operator.state.stored_record import load_record

NOW = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
UID = "0f9a7c1e-0000-4000-8000-000000000001"
AUTHORITY = "a" * 16


def spec(*, cloud: int = 2, hpc: int = 0, **changes: Any) -> dict[str, Any]:
    """Return a manifest's spec with up to one pool of each kind."""
    pools: list[dict[str, Any]] = []
    if cloud:
        pools.append({"name": "cloud", "replicas": cloud, "cloud": {}})
    if hpc:
        pools.append({"name": "lumi", "replicas": hpc, "hpc": {"siteRef": {"name": "site"}, "environment": "py"}})
    return {"rounds": 5, "task": {"image": "img", "command": ["python", "t.py"]}, "pools": pools, **changes}


def site(*, namespaces: tuple[str, ...] = ("*",)) -> HpcSiteSpec:
    """Return an HPCSite's spec."""
    return parse_site_spec(
        {
            "endpoint": "bridge.example:7444",
            "tls": {"secretRef": {"name": "bridge", "namespace": "isthmus"}},
            "allowedNamespaces": list(namespaces),
        }
    )


def job(wanted: dict[str, Any] | None = None, **changes: Any) -> Job:
    """Return a FederatedJob as the API server stores it."""
    wanted = spec() if wanted is None else wanted
    outside = '"hpc"' in json.dumps(wanted) + changes.get("record", "")
    base = Job("demo", "team", UID, 1, NOW, wanted, finalizers=(ids.FINALIZER,) if outside else ())
    return replace(base, **changes)


def client(index: int, attempt: int = 0, phase: str = "Running", **changes: Any) -> PodView:
    """Return a client's pod."""
    name = names.client(job(), "cloud", index, attempt)
    base = PodView(name, f"uid-{name}", names.ROLE_CLIENT, "cloud", index, attempt, phase, authority=AUTHORITY)
    return replace(base, created=NOW, ready=phase == "Running", **changes)


def aggregator(phase: str = "Running", **changes: Any) -> PodView:
    """Return the aggregator's pod."""
    base = PodView(
        "demo-aggregator", "uid-aggregator", names.ROLE_AGGREGATOR, phase=phase, authority=AUTHORITY, created=NOW
    )
    return replace(base, **{"ready": phase == "Running", **changes})


def present(wanted: FederatedJobSpec) -> frozenset[str]:
    """Return the keys of the objects that a running job's pods need, without Secrets."""
    keys = {"ConfigMap/demo-job", "Service/demo-aggregator"}
    if wanted.aggregator.checkpoint.storage == "PersistentVolumeClaim":
        keys.add("PersistentVolumeClaim/demo-checkpoints")
    if wanted.task.code is not None:
        keys.add("ConfigMap/demo-code")
    return frozenset(keys)


def certificates(wanted: FederatedJobSpec) -> dict[str, str]:
    """Return the certificates of a running job, by Secret."""
    issued = desired.certificates(job(), wanted)
    return {item.secret: f"first of {item.secret}" for item in issued}


def standing(wanted: dict[str, Any] | None = None, **changes: Any) -> Observed:
    """Return a state in which all objects exist except for pods and pools."""
    parsed = parse_spec(spec() if wanted is None else wanted)
    base = Observed(
        accepted=parsed,
        present=present(parsed),
        authority=AUTHORITY,
        certificates=certificates(parsed),
        service=ServiceView("10.96.0.7"),
        sites={"site": site()},
    )
    return replace(base, **changes)


def array(*, authority: str = AUTHORITY, certificate: str = "", **changes: Any) -> ArrayRecord:
    """Return the record of an HPC pool's array of two clients that the site has accepted."""
    made = ArrayRecord("site", state=ArrayState.ACCEPTED, size=2, submission=Submission(0, authority, certificate))
    return replace(made, **changes)


def plan(job_: Job, observed: Observed, now: dt.datetime, options: PlanOptions) -> act.Plan:
    """Plan with the record that the job's annotation holds."""
    return planning.plan(job_, replace(observed, record=load_record(job_)), now, options)


def of_kind(decided: act.Plan, kind: type) -> list[Any]:
    """Return the plan's actions of one kind."""
    return [item for item in decided.actions if isinstance(item, kind)]


class World:
    """A simulated cluster and site that carry out plans and let time pass."""

    options = PlanOptions(cluster="sim", starts_per_pass=3)

    def __init__(self, wanted: dict[str, Any], observed: Observed | None = None, **changes: Any) -> None:
        self.job = job(wanted, **{"finalizers": (), **changes})
        self.now = NOW
        self.observed = observed or Observed(sites={"site": site()})
        self.pools: dict[str, PoolView] = {}  # at the site, by key
        self.requests: dict[str, Any] = {}  # their requests
        self.shrunk: list[tuple[str, int]] = []
        self.site_up = True
        self.denied = False
        self.quota: int | None = None
        self.trains = True  # rounds advance while the quorum is reached
        self.rounds = 0
        self.gone = False
        self.events: list[act.Emit] = []
        self._serial = 0

    # -- one step of the operator

    def look(self) -> Observed:
        """Return what the operator would observe now."""
        record = self._record()
        pools, problems = {}, dict(self.observed.problems)
        for name, entry in record.hpc.items():
            if not entry.at_site:
                continue
            if not self.site_up:
                problems[name] = PoolProblem(ProblemKind.UNREACHABLE, "no route", self.now)
                continue
            if name in problems and problems[name].kind is ProblemKind.UNREACHABLE:
                del problems[name]
            view = self.pools.get(self._key(name.pool, entry.attempt))
            pools[name] = replace(view, attempt=entry.attempt) if view else PoolView(entry.attempt, PoolPhase.ABSENT)
        return replace(self.observed, pools=pools, problems=problems, federation=self._federation())

    def step(self) -> act.Plan:
        """Observe, plan and apply once."""
        observed = self.look()
        decided = plan(self.job, observed, self.now, self.options)
        for action in decided.actions:
            self._apply(action)
        if not self.gone:
            self.job = replace(self.job, status=copy.deepcopy(dict(decided.status)))
        self.events += decided.events
        return decided

    def run(self, steps: int = 400, seconds: float = 5.0) -> int:
        """Step while time passes until nothing is left to do; return the number of steps."""
        quiet = 0
        for number in range(steps):
            before = self.job.status
            decided = self.step()
            changed = bool(decided.actions) or bool(merge_patch(before, self.job.status))
            quiet = 0 if changed or self._moves() else quiet + 1
            if self.gone or (quiet >= 3 and decided.requeue > 300) or quiet >= 60:
                return number
            self.tick(seconds)
        raise AssertionError(f"does not converge: {self.job.status}, {self.look()}")

    def _record(self) -> Record:
        return load_record(self.job)

    def _key(self, pool: str, attempt: int) -> str:
        return render_hpc.key(self.options.cluster, self.job, pool, attempt)

    def _apply(self, action: act.Action) -> None:
        seen = self.observed
        match action:
            case act.SaveJob():
                if action.record is not None:
                    self.job = replace(self.job, record=action.record)
                if action.names:
                    self.job = replace(self.job, names=action.names)
                if action.finalizers is not None:
                    self.job = replace(self.job, finalizers=action.finalizers)
                    self.gone = self.job.deleted is not None and ids.FINALIZER not in action.finalizers
            case act.Apply():
                self.observed = replace(seen, present=seen.present | {f"{action.kind}/{action.name}"})
                if action.kind == "ConfigMap":
                    self.observed = replace(self.observed, accepted=parse_spec(self.job.spec))
                if action.kind == "Service":
                    self.observed = replace(self.observed, service=ServiceView("10.96.0.7"))
            case act.CopyCode():
                kept = seen.present | {f"ConfigMap/{action.name}"}
                self.observed = replace(seen, present=kept, code=("train.py",))
            case act.CreateAuthority():
                self._serial += 1
                self.observed = replace(seen, authority=f"{self._serial:016x}", certificates={})
            case act.RenewAuthority():
                assert seen.authority
                self.observed = replace(seen, authority_ends=False, certificates={})
            case act.IssueCertificate():
                assert seen.authority, "there is no CA to sign it"
                self._serial += 1
                certificate = f"{self._serial} of {action.secret}"
                self.observed = replace(seen, certificates={**seen.certificates, action.secret: certificate})
            case act.CreatePod():
                self._create(action)
            case act.DeletePod():
                self._pods(
                    *(replace(pod, deleting=True) if pod.uid == action.uid else pod for pod in seen.pods),
                )
            case act.EnsurePool() | act.RenewCredentials() | act.CancelPool() | act.ShrinkPool():
                self._ask_site(action)
            case act.DeleteJob():
                self.job = replace(self.job, deleted=self.now)
                self.gone = not self.job.finalizers

    def _create(self, action: act.CreatePod) -> None:
        if any(pod.name == action.name for pod in self.observed.pods):
            return
        if self.quota is not None and sum(not pod.ended for pod in self.observed.pods) >= self.quota:
            refusal = Refusal("exceeded quota", self.now + dt.timedelta(seconds=10))
            self.observed = replace(self.observed, refusals={**self.observed.refusals, f"Pod/{action.name}": refusal})
            return
        self._serial += 1
        metadata = action.body["metadata"]
        labels = metadata["labels"]
        view = PodView(
            action.name,
            f"uid-{self._serial}",
            labels[ids.LABEL_ROLE],
            labels.get(ids.LABEL_POOL, ""),
            int(labels.get(ids.LABEL_INDEX, 0)),
            int(labels.get(ids.LABEL_ATTEMPT, 0)),
            authority=metadata["annotations"][names.ANNOTATION_AUTHORITY],
            created=self.now,
        )
        self._pods(*self.observed.pods, view)

    def _ask_site(self, action: act.EnsurePool | act.RenewCredentials | act.CancelPool | act.ShrinkPool) -> None:
        problems = dict(self.observed.problems)
        problems.pop(action.array, None)
        known = self.pools.get(action.key)
        later = self.now + dt.timedelta(seconds=30)
        if not self.site_up:
            problems[action.array] = PoolProblem(ProblemKind.UNREACHABLE, "no route", self.now)
        elif isinstance(action, act.CancelPool):
            if known is None or not known.ended:
                self.pools[action.key] = PoolView(0, PoolPhase.CANCELLED)
        elif isinstance(action, act.RenewCredentials):
            assert known is not None and not known.ended
            self._deliver(action)
        elif isinstance(action, act.ShrinkPool):
            assert known is not None and not known.ended
            self.shrunk.append((action.key, action.replicas))
            count = action.replicas
            self.pools[action.key] = replace(
                known, desired=count, queued=min(known.queued, count), running=min(known.running, count)
            )
        elif self.denied:
            problems[action.array] = PoolProblem(ProblemKind.DENIED, "rule partitions: no", later)
        elif known is None:
            count, moment = action.spec.replicas, self.now.timestamp()
            self.requests[action.key] = action.spec
            self._deliver(action)
            self.pools[action.key] = PoolView(
                0, PoolPhase.PENDING, job_id=str(17 + len(self.pools)), queued=count, submitted_at=moment, desired=count
            )
        self.observed = replace(self.observed, problems=problems)

    def _deliver(self, action: act.EnsurePool | act.RenewCredentials) -> None:
        seen = self.observed
        certificate = seen.certificates.get(action.secret, "the one before")
        self.observed = replace(seen, delivered={**seen.delivered, action.key: certificate})

    # -- the simulated cluster and site

    def tick(self, seconds: float) -> None:
        """Let time pass: pods start and vanish, the queue moves, rounds are completed."""
        self.now += dt.timedelta(seconds=seconds)
        refusals = {key: value for key, value in self.observed.refusals.items() if value.retry_at > self.now}
        self.observed = replace(self.observed, refusals=refusals)
        pods = [pod for pod in self.observed.pods if not pod.deleting]
        pods = [replace(pod, phase="Running", ready=True) if pod.phase == "Pending" else pod for pod in pods]
        self._pods(*pods)
        for key, view in self.pools.items():
            if view.phase is PoolPhase.PENDING:
                self.pools[key] = replace(view, phase=PoolPhase.RUNNING, running=view.queued, queued=0)
        federation = self._federation()
        if federation is None or not self.trains:
            return
        enough = sum(federation.connected.values()) >= self._accepted().min_clients
        if enough and self.rounds < self._accepted().rounds:
            self.rounds += 1
        elif self.rounds >= self._accepted().rounds:
            # First the clients end, then the aggregator.
            ended: dict[str, Any] = {"phase": "Succeeded", "ready": False, "exit_code": 0, "finished": self.now}
            self._pods(*(replace(pod, **ended) if not pod.ended else pod for pod in self.observed.pods))
            said = f'{{"phase":"COMPLETE","completedRounds":{self.rounds}}}'
            self._pods(
                *(
                    replace(pod, message=said) if pod.name == "demo-aggregator" and pod.finished == self.now else pod
                    for pod in self.observed.pods
                )
            )
            for key, view in self.pools.items():
                if not view.ended:
                    self.pools[key] = replace(view, phase=PoolPhase.SUCCEEDED, succeeded=view.running, running=0)

    def fail(self, name: str, code: int = 1, **changes: Any) -> None:
        """End a pod's program with a failure."""
        ended: dict[str, Any] = {
            "phase": "Failed",
            "ready": False,
            "exit_code": code,
            "finished": self.now,
            "reason": "Error",
        } | changes
        self._pods(*(replace(pod, **ended) if pod.name == name else pod for pod in self.observed.pods))

    def resize(self, replicas: int) -> None:
        """Change the HPC pool's replicas in the manifest."""
        pools = copy.deepcopy(self.job.spec["pools"])
        for pool in pools:
            if "hpc" in pool:
                pool["replicas"] = replicas
        self.job = replace(self.job, spec={**self.job.spec, "pools": pools}, generation=self.job.generation + 1)

    def living(self) -> list[tuple[int, int, int]]:
        """Return the site's running arrays: attempt, first client, number of clients."""
        alive = [(self.requests[key], view) for key, view in self.pools.items() if not view.ended]
        return sorted((asked.attempt, asked.first_index, view.queued + view.running) for asked, view in alive)

    def vanish(self, name: str) -> None:
        """Remove a pod without a trace."""
        self._pods(*(pod for pod in self.observed.pods if pod.name != name))

    def pod(self, name: str) -> PodView:
        """Return a pod by its name."""
        return next(pod for pod in self.observed.pods if pod.name == name)

    def condition(self, type_: str) -> str:
        """Return ``Status/Reason`` of a condition; empty if it is not set."""
        for item in self.job.status.get("conditions") or ():
            if item["type"] == type_:
                return f"{item['status']}/{item['reason']}"
        return ""

    def _pods(self, *pods: PodView) -> None:
        self.observed = replace(self.observed, pods=tuple(pods))

    def _accepted(self) -> FederatedJobSpec:
        return self.observed.accepted or parse_spec(self.job.spec)

    def _moves(self) -> bool:
        """Return True if pods are still starting or ending."""
        return any(pod.deleting or pod.phase == "Pending" for pod in self.observed.pods)

    def _federation(self) -> FederationView | None:
        pod = next((pod for pod in self.observed.pods if pod.name == "demo-aggregator"), None)
        if pod is None or pod.phase != "Running" or pod.deleting:
            return None
        good = pod.authority
        cloud = {
            item.index for item in self.observed.pods
            if item.role == names.ROLE_CLIENT and item.phase == "Running" and item.authority == good
        }  # fmt: skip
        running = sum(view.running for view in self.pools.values() if not view.ended)
        total = self._accepted().rounds
        return FederationView(
            "COMPLETE" if self.rounds >= total else "TRAINING" if self.rounds else "WAITING",
            completed_rounds=self.rounds,
            current_round=min(self.rounds + 1, total),
            total_rounds=total,
            connected={"cloud": len(cloud), "lumi": running},
        )
