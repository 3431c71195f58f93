"""The client's part in secure aggregation, beside the script's thread.

The steps of an instance are answered at once, also while the script trains, and the sum of the instance's masks is made
meanwhile. The script's thread brings the update (:meth:`SecureParticipant.masked`) once it is there.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from isthmus_contracts import identities
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa
from isthmus_contracts.text import one_line
from isthmus_contracts.wire.parties import PartyError, Signer

from ....secure_aggregation.client import ClientProtocol
from ....secure_aggregation.layout import source, wire_specs
from ....secure_aggregation.primitives.masks import add_masks
from ....secure_aggregation.refusal import Reason, Refusal
from ....tensors import State, allocate
from ...context import Context
from ...errors import FederationError
from ..audit import Results
from ..site_rules import SiteRules
from .background import BackgroundWork
from .held_update import HeldUpdate, Work

log = logging.getLogger("isthmus")

T = TypeVar("T")

# A wait that takes longer is explained in the log. Seconds.
_EXPLAIN_AFTER = 5.0
_POLL = 0.25
# Refusals that end the client: the next instance cannot be better, since the job has too few parties for this site, or
# the aggregator has replaced this client's entry or its model. After any other one the client waits for the next.
_ENDING = frozenset({Reason.PARTIES, Reason.ENTRY, Reason.BASE, Reason.NOISE})
# Another client's entry with an unknown root or a replaced key may be that client's fault, which the aggregator then
# leaves out. As many instances in a row with such an entry end this client.
_AT_FAULT = frozenset({Reason.CREDENTIAL, Reason.KEY, Reason.SIGNATURE})
_MOST_FAULTS = 3


class NotMaskedError(Exception):
    """The update is not wanted any more, or this client may not contribute it. ``str()`` gives the reason."""


@dataclass(eq=False)
class _Instance:
    """The newest instance, as far as this client knows it."""

    begin: sa.SecureBegin
    cancel: threading.Event = field(default_factory=threading.Event)
    total: "Future[State] | None" = None
    """The sum of all masks, once the other clients are known."""
    update: HeldUpdate | None = None
    """The only update that these masks may cover."""
    vector: State = field(default_factory=dict)
    """That update under the masks."""
    lent: bool = False
    """True while the vector is being sent: its memory must not change."""
    over: str = ""
    """Why nothing can be contributed to it any more, or empty."""

    @property
    def work(self) -> Work:
        """The work whose results are summed."""
        return Work(self.begin.purpose, self.begin.round, self.begin.attempt)

    @property
    def shown(self) -> str:
        if self.over:
            return self.over
        if self.total is None:
            return "the other clients' keys and shares are not here yet"
        return "its masks are being made"


@dataclass(frozen=True)
class Masked:
    """An update under the masks of one instance: it looks random."""

    incarnation: int
    tensors: State


class SecureParticipant:
    """One client of secure aggregation, over all instances of a session.

    :meth:`receive` is called in the session's thread and returns at once; a thread of its own runs the protocol;
    another one, of low priority, makes masks; :meth:`masked` is called in the script's thread.
    """

    def __init__(
        self, job_uid: str, context: Context, instance: str, directory: Path, site: SiteRules,
        send: Callable[[pb.ClientMessage], None], end: Callable[[FederationError], None],
    ) -> None:  # fmt: skip
        """``directory`` has the files of wire/parties.py. ``end`` is called once, if the client must not go on."""
        self._job_uid, self._context, self._process = job_uid, context, instance
        self._directory = directory
        self._site = site
        self._send, self._end = send, end
        self._steps: queue.Queue[sa.SecureServerMessage | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._background = BackgroundWork("isthmus-masks")
        # Guards all below; notified when any of it changes.
        self._changed = threading.Condition()
        self._protocol: ClientProtocol | None = None
        self._instance: _Instance | None = None
        self._error: FederationError | None = None
        self._faults = 0  # instances in a row with another client's entry at fault
        self._room: State = {}

    # ---- in the session's thread

    def receive(self, message: sa.SecureServerMessage) -> None:
        """Take a step of the aggregator."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="isthmus-secure", daemon=True)
            self._thread.start()
        self._steps.put(message)

    def close(self, timeout: float) -> None:
        """End the threads, and wait for them up to ``timeout`` seconds."""
        with self._changed:
            if self._instance is not None:
                self._instance.cancel.set()
        if self._thread is not None:
            self._steps.put(None)
            self._thread.join(timeout)
        self._background.close(timeout)

    # ---- in the protocol's thread

    def _run(self) -> None:
        while (message := self._steps.get()) is not None:
            try:
                self._take(message)
            except FederationError as error:
                self._fail(error)
            except Exception as error:
                log.exception("secure aggregation: a step of the aggregator failed")
                self._fail(FederationError(f"secure aggregation: {type(error).__name__}: {one_line(str(error))}"))

    def _take(self, message: sa.SecureServerMessage) -> None:
        with self._changed:
            if self._error is not None:
                return
            if self._protocol is None:
                self._protocol = self._new_protocol()
            try:
                answers = self._protocol.receive(message)
            except Refusal as refusal:
                self._refuse(message.incarnation, refusal)
                return
            for answer in answers:
                self._send(pb.ClientMessage(secure=answer))
            self._follow(message)

    def _new_protocol(self) -> ClientProtocol:
        """Return the protocol with the files that the site gave this client. Raises :class:`FederationError`."""
        where = f"({identities.ENV_TLS_DIR} must name a directory with the files of this client's party)"
        if self._site.trust is None:
            path = self._directory / identities.TRUST_FILE
            raise FederationError(f"the job uses secure aggregation, and {path} is missing {where}")
        try:
            signer = Signer.read(self._directory)
        except OSError as error:
            raise FederationError(
                f"the job uses secure aggregation, and {error.filename} cannot be read: {error.strerror} {where}"
            ) from None
        except PartyError as error:
            raise FederationError(f"secure aggregation: {self._directory}: {error}") from None
        here = self._context
        return ClientProtocol(
            self._job_uid, here.pool, here.index, here.attempt, self._process, signer, self._site.trust
        )  # fmt: skip

    def _follow(self, message: sa.SecureServerMessage) -> None:
        """Note what a step, which the protocol has accepted, means for the masks."""
        assert self._protocol is not None
        match message.WhichOneof("step"):
            case "begin" if self._instance is None or message.incarnation != self._instance.begin.incarnation:
                self._drop_masks()
                self._instance = _Instance(message.begin)
                names = [source(tensor) for tensor in message.begin.layout.tensors]
                self._site.require_names(names, Results("update", message.begin.round, incarnation=message.incarnation))
            case "end" if self._instance is not None and message.incarnation == self._instance.begin.incarnation:
                self._instance.over = message.end.message or "the sum is open already"
                if message.end.message:
                    log.info("secure aggregation: %s", one_line(message.end.message))
                self._drop_masks()
        instance, masks = self._instance, self._protocol.masks
        if instance is not None and masks is not None and instance.total is None and not instance.over:
            self._faults = 0
            keys = masks.keys
            room, self._room = self._room, {}
            instance.total = self._background.submit(lambda: _sum_of_masks(instance, keys, room))
            instance.total.add_done_callback(lambda _: self._notify())
        self._changed.notify_all()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _drop_masks(self) -> None:
        """Give up the masks of the present instance. Their memory is reused, unless it is being sent."""
        if (instance := self._instance) is None:
            return
        instance.cancel.set()
        total, instance.total = instance.total, None
        if instance.lent:
            return
        if instance.vector:
            self._room, instance.vector = instance.vector, {}
        elif total is not None and total.done() and total.exception() is None:
            self._room = total.result()

    def _refuse(self, incarnation: int, refusal: Refusal) -> None:
        """Tell the aggregator that this client leaves the instance; end the client where the next cannot be better."""
        self._send(pb.ClientMessage(secure=refusal.answer(incarnation)))
        line = f"secure aggregation refused ({refusal.reason}): {refusal}"
        self._faults += refusal.reason in _AT_FAULT
        if refusal.reason in _ENDING or self._faults == _MOST_FAULTS:
            self._fail(FederationError(line))
            return
        log.warning("%s; waiting for the next instance", line)
        if self._instance is not None and self._instance.begin.incarnation <= incarnation:
            self._instance.over = line
            self._drop_masks()
        self._changed.notify_all()

    def _fail(self, error: FederationError) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
                self._end(error)
            self._changed.notify_all()

    # ---- in the script's thread

    def layout(self, work: Work, interrupted: Callable[[], str]) -> sa.SecureLayout:
        """Wait for the form of a round's masked updates. Raises as :meth:`masked` does."""
        return self._wait(lambda instance: instance.begin.layout if instance.work == work else None, interrupted)

    def evaluation(self, interrupted: Callable[[], str]) -> sa.SecureBegin:
        """Wait for the instance that sums up evaluations; return its beginning. Raises as :meth:`masked` does."""
        evaluates = sa.SecureBegin.EVALUATE
        return self._wait(
            lambda instance: instance.begin if instance.begin.purpose == evaluates else None, interrupted
        )  # fmt: skip

    def in_background(self, job: Callable[[], T]) -> "Future[T]":
        """Run a job in the thread that makes the masks."""
        return self._background.submit(job)

    @contextmanager
    def masked(self, update: HeldUpdate, interrupted: Callable[[], str], above: int = 0) -> Iterator[Masked]:
        """Wait for the masks of the newest instance, and yield the update under them.

        Within one instance the result is always the same, and no other update gets these masks. Its memory must not be
        used after the ``with`` block. ``above``: the instance's incarnation must be larger. ``interrupted`` is polled:
        once it returns a reason, :class:`NotMaskedError` is raised with it. Raises :class:`FederationError` if the
        client must not go on.
        """

        def claimed(instance: _Instance) -> _Instance | None:
            return self._claimed(instance, update) if instance.begin.incarnation > above else None

        instance = self._wait(claimed, interrupted)
        try:
            if not instance.vector:
                assert instance.total is not None
                total = instance.total.result()
                for name, mask in total.items():
                    mask.add_(update.tensors[name])  # integers wrap around
                instance.vector = total
            yield Masked(instance.begin.incarnation, instance.vector)
        finally:
            with self._changed:
                instance.lent = False
                if instance is not self._instance:
                    self._room, instance.vector = instance.vector, {}

    def newer_than(self, incarnation: int, update: HeldUpdate) -> bool:
        """Return whether another instance than this one wants the update."""
        with self._changed:
            instance = self._instance
            return (
                instance is not None
                and not instance.over
                and instance.work == update.work
                and instance.begin.incarnation > incarnation
            )

    def _claimed(self, instance: _Instance, update: HeldUpdate) -> _Instance | None:
        """Return the instance, lent to the update, if its masks are ready for it."""
        if instance.work != update.work or instance.over:
            return None
        if instance.update is None:
            self._require_same(instance, update)
        elif instance.update is not update:
            raise FederationError("secure aggregation: the masks of this instance cover another update already")
        if not instance.vector:
            if instance.over or instance.total is None or not instance.total.done():
                return None
            assert self._protocol is not None
            try:
                self._protocol.contributed(update.key)
            except Refusal as refusal:
                self._refuse(instance.begin.incarnation, refusal)
                return None
        instance.update, instance.lent = update, True
        return instance

    def _require_same(self, instance: _Instance, update: HeldUpdate) -> None:
        """Leave an instance that is not for the model or the form of this update."""
        begin = instance.begin
        if begin.layout.SerializeToString(deterministic=True) != update.layout:
            reason, text = Reason.LAYOUT, "the form of the round's updates has changed meanwhile"
        elif begin.base_digest != update.base_sha256:
            reason = Reason.BASE
            text = (
                f"round {begin.round}: this client has trained from another model, or with other settings, than the"
                f" others are said to have: their SHA-256 is {update.base_sha256[:16]}..., not"
                f" {begin.base_digest[:16]}..."
            )
        else:
            return
        self._refuse(begin.incarnation, Refusal(reason, text))

    def _wait(self, probe: Callable[[_Instance], T | None], interrupted: Callable[[], str]) -> T:
        """Return what ``probe`` finds, under the lock, in the newest instance, once it is there."""
        since, explained = time.monotonic(), False
        with self._changed:
            while True:
                found = None if self._error is not None or self._instance is None else probe(self._instance)
                if found is not None:
                    return found
                if self._error is not None:
                    raise self._error
                if reason := interrupted():
                    raise NotMaskedError(reason)
                if not explained and time.monotonic() - since > _EXPLAIN_AFTER:
                    explained = True
                    shown = "the aggregator has not begun it" if self._instance is None else self._instance.shown
                    log.info("waiting for secure aggregation: %s", shown)
                self._changed.wait(_POLL)


def _sum_of_masks(instance: _Instance, keys: Sequence[tuple[bytes, int]], room: State) -> State:
    """Return the sum of an instance's masks. Raises ``MasksCancelledError``."""
    total = {spec.name: allocate(spec, room).zero_() for spec in wire_specs(instance.begin.layout)}
    add_masks(total, keys, cancel=instance.cancel)
    return total
