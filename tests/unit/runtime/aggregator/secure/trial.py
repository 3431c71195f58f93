"""Job with secure aggregation in this process: a real aggregator, and clients that are objects without a network."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from isthmus.aggregator.app import Aggregator
from isthmus.aggregator.clients.membership import Client
from isthmus.aggregator.job import Job
from isthmus.aggregator.rounds.privacy_budget import protect
from isthmus.aggregator.storage.checkpoints import CheckpointStore
from isthmus.aggregator.telemetry.metrics import AggregatorMetrics
from isthmus.aggregator.telemetry.tracking.tracker import make_tracker
from isthmus.secure_aggregation.client import ClientProtocol
from isthmus.secure_aggregation.fixed_point import Contribution, Quantised, quantise
from isthmus.secure_aggregation.parameters import UpdateKey
from isthmus.secure_aggregation.primitives.masks import add_masks
from isthmus.secure_aggregation.refusal import Refusal
from isthmus.strategies import make_strategy
from isthmus.tensors import State, sha256_of, specs_of
from isthmus_contracts.manifests.manifest import parse_spec
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa
from isthmus_contracts.wire.parties import Signer, Trust, issue, new_root

UID, POOL = "uid", "pool"
SECONDS = 60
MODEL: State = {"w": torch.zeros(40), "n": torch.tensor(5)}


class SecureTrial:
    """An aggregator, which can be replaced as if it had been killed, and its clients."""

    def __init__(self, directory: Path, clients: int, rounds: int = 1, **changes: Any) -> None:
        secure = {"metrics": {"score": "10"}, "clip": "4", "maxExamples": 100, **changes.pop("secure", {})}
        privacy = {"secureAggregation": secure, **changes.pop("privacy", {})}
        spec = {"rounds": rounds, "task": {"image": "unused", "command": ["python"]},
                "pools": [{"name": POOL, "replicas": clients, "cloud": {}}],
                "selection": {"minClients": clients}, "objective": {"metric": "score"},
                "privacy": privacy, **changes}  # fmt: skip
        self.job = Job("job", "default", UID, parse_spec(spec))
        self.directory = directory
        root, public = new_root()
        self.trust = Trust(roots={"cloud": public})
        self.signer = Signer(*issue(root, "cloud", UID, POOL))
        self.clients = [InProcess(self, index) for index in range(clients)]
        self._open()

    def _open(self) -> None:
        self.store = CheckpointStore(self.directory, UID, keep=100)
        self.metrics = AggregatorMetrics("default", "job")
        rule = make_strategy(self.job.spec.strategy, self.directory, self.job.spec.most_trainers)
        rule, budget = protect(self.job.spec, rule)
        tracker = make_tracker(self.job, self.directory)
        self.aggregator = Aggregator(self.job, self.store, rule, self.metrics, tracker, budget)
        self.running: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.running = asyncio.create_task(self.aggregator.coordinator.run())

    async def crash(self) -> None:
        """End the aggregator as SIGKILL would, and open another one over the same directory."""
        assert self.running is not None
        self.running.cancel()
        await asyncio.wait([self.running])
        for client in self.clients:
            client.disconnect()
        self._open()

    def connect(self, *clients: "InProcess") -> None:
        for client in clients or self.clients:
            client.connect()

    @property
    def status(self) -> pb.FederationStatus:
        return self.aggregator.reporter.status()

    async def until(self, what: Callable[[], Any]) -> None:
        async with asyncio.timeout(SECONDS):
            while not what():
                if self.running is not None and self.running.done():
                    self.running.result()
                await asyncio.sleep(0.005)

    async def complete(self) -> None:
        assert self.running is not None
        async with asyncio.timeout(SECONDS):
            await self.running

    def close(self) -> None:
        if self.running is not None:
            self.running.cancel()
        for client in self.clients:
            client.disconnect()


class InProcess:
    """Client whose change of each round is its index + 1 eighths, on as many examples as that."""

    def __init__(self, trial: SecureTrial, index: int, attempt: int = 0) -> None:
        self.trial, self.index, self.attempt = trial, index, attempt
        self.name = f"i{index}-{attempt}"
        self.protocol = ClientProtocol(UID, POOL, index, attempt, self.name, trial.signer, trial.trust)
        self.mute: set[str] = set()
        """Steps that it does not answer. "push": it keeps its update."""
        self.spoil: Callable[[sa.SecureClientMessage], None] = lambda message: None
        self.trained: list[tuple[int, int]] = []
        """Round and attempt of each training."""
        self.sent: dict[int, list[State]] = {}
        """Masked updates, by incarnation."""
        self.refusals: list[Refusal] = []
        self.replies: list[pb.PushReply] = []
        self._held: dict[tuple[int, int, int], Quantised] = {}
        self._offer = pb.Offer()
        self._member: Client | None = None
        self._task: asyncio.Task[None] | None = None

    def connect(self) -> None:
        hello = pb.Hello(
            job_uid=UID, pool=POOL, index=self.index, attempt=self.attempt, instance=self.name, evaluates=True,
            round=self._offer.round, base_digest=self._offer.base_digest,
        )  # fmt: skip
        self._member = self.trial.aggregator.sessions.join(hello)
        self._task = asyncio.create_task(self._run(self._member))

    def disconnect(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._member is not None and self._member.outbox is not None:
            self.trial.aggregator.sessions.leave(self._member, self._member.outbox)

    async def _run(self, member: Client) -> None:
        outbox = member.outbox
        assert outbox is not None
        while (message := await outbox.get()) is not None:
            if message.HasField("offer"):
                await self._take_offer(message.offer)
            elif message.HasField("secure"):
                await self._step(member, message.secure)

    async def _take_offer(self, offer: pb.Offer) -> None:
        self._offer = offer
        if offer.kind == pb.Offer.INITIALIZE:
            header = self._header(0, specs=specs_of(MODEL))
            self.replies.append(await self.trial.aggregator.intake.accept(header, dict(MODEL)))

    async def _step(self, member: Client, message: sa.SecureServerMessage) -> None:
        try:
            answers = self.protocol.receive(message)
        except Refusal as refusal:
            self.refusals.append(refusal)
            answers = [refusal.answer(message.incarnation)]
        for answer in answers:
            self.spoil(answer)
            if answer.WhichOneof("step") not in self.mute:
                self.trial.aggregator.sessions.receive(member, pb.ClientMessage(secure=answer))
        if message.HasField("shares") and "push" not in self.mute:
            await self.contribute()

    async def contribute(self) -> None:
        """Hand in the update of the present instance."""
        begin, masks = self.protocol.begin, self.protocol.masks
        if begin is None or masks is None:
            return
        held = self._update(begin)
        key = UpdateKey(begin.round, begin.base_digest, begin.attempt, sha256_of(held.tensors))
        self.protocol.contributed(key)
        masked = {name: tensor.clone() for name, tensor in held.tensors.items()}
        add_masks(masked, masks.keys)
        self.sent.setdefault(begin.incarnation, []).append(masked)
        header = self._header(begin.round, specs=specs_of(masked), secure_incarnation=begin.incarnation)
        self.replies.append(await self.trial.aggregator.intake.accept(header, masked))

    def _update(self, begin: sa.SecureBegin) -> Quantised:
        """Return the update of a round, which is trained once for each attempt."""
        key = (begin.purpose, begin.round, begin.attempt)
        if key not in self._held:
            share, score = (self.index + 1) / 8, float(self.index)
            contribution = Contribution(self.index + 1, {}, {}, {"score": score}, self.index + 1)
            if begin.purpose == sa.SecureBegin.EVALUATE:
                self._held[key] = quantise(begin.layout, {}, {}, contribution)
            else:
                self.trained.append((begin.round, begin.attempt))
                assert self.trial.aggregator.training.model is not None
                base = self.trial.aggregator.training.model.checkpoint.state
                trained = {"w": base["w"] + share, "n": base["n"] + 3}
                self._held[key] = quantise(begin.layout, base, trained, contribution)
        return self._held[key]

    def _header(self, number: int, specs: list[pb.TensorSpec], **fields: Any) -> pb.UpdateHeader:
        return pb.UpdateHeader(
            job_uid=UID, pool=POOL, index=self.index, attempt=self.attempt, instance=self.name, round=number,
            base_digest=self._offer.base_digest, tensors=specs, **fields,
        )  # fmt: skip
