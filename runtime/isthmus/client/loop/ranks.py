"""The processes of one client, when its script runs under torch.distributed.

Rank 0 holds the session. What it decides reaches the others as words in the process group's own store, which they look
into a few times a second; only tensors go by broadcast, at moments at which every rank is known to be there. So waiting
for an offer, which may take hours, is in nobody's collective: no time-out of gloo or NCCL runs, no GPU spins, signals
get through, and a rank that fails can say so without anybody's help.
"""

import base64
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import distributed

from isthmus_contracts.pb import federation_pb2 as pb

from ...tensors import State, allocate, flat, specs_of
from ..errors import IN_A_FORK, FederationError
from ..session.session import GIVE_UP_AFTER
from .process import one_line

log = logging.getLogger("isthmus")

T = TypeVar("T")
Word = dict[str, Any]

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.2
# Each rank gives a sign of life so often; one that has been silent for longer is dead, or out of reach. Seconds.
_BEAT_SECONDS = 5.0
_SILENCE = 60.0
# A broadcast moves at most so many bytes, which is what it takes of a GPU's memory beside the model.
_PIECE = 64 << 20
# What is added to a count of ranks by one that wants to stop.
_STOP = 1 << 32
_uses = itertools.count(1)


class RankGoneError(FederationError):
    """Another rank of this client has failed, or has gone."""


class Replicas:
    """The ranks of this client: here the only one, so nothing has to be said."""

    rank = 0

    def say(self, kind: str, **content: str) -> None:
        """Tells the others where the script goes next."""

    def share(self, state: State) -> None:
        """Sends tensors to the others."""

    def place(self, tensors: Iterable[torch.Tensor]) -> None:
        """Learns from the model's tensors on which device this rank works."""

    def told_to_stop(self, own: bool) -> bool:
        """Return whether any rank has been told to stop; given whether this one has. Every rank has to ask."""
        return own

    def check(self) -> None:
        """Raises :class:`RankGoneError` where another rank has failed."""

    def others_told_to_stop(self) -> bool:
        """Return whether another rank has been told to stop while it waited for this one."""
        return False

    def fail(self, error: BaseException | None) -> None:
        """This rank cannot go on (``None``: has left its loop): nobody shall wait for it. Never waits itself."""

    def close(self, patience: float) -> None:
        """Nothing more will be said. Waits, for so many seconds, until the others have heard what was."""

    def abandon(self) -> None:
        """Give the ranks up in a fork of this process, which has its parent's connection to the store."""


def replicas_here(stopping: threading.Event) -> "Replicas | Group":
    """This process's group, if there is one."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return Group(stopping)
    return Replicas()


class Group(Replicas):
    """The ranks of the default process group. ``stopping`` is set when this one was told to stop.

    All waiting raises :class:`RankGoneError` where another rank has failed or has gone.
    """

    def __init__(self, stopping: threading.Event) -> None:
        # Not there in every build of torch.
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        store = _get_default_store()
        if store is None:
            raise FederationError("the process group has no store (MPI?): use the gloo or the NCCL backend")
        # Every call of rounds() has its own words. All ranks call it equally often.
        self._store = PrefixStore(f"isthmus/{next(_uses)}", store)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.stopping = stopping
        self._device = _broadcast_device(())
        self._words = 0
        self._questions = 0
        self._stop_known = False
        self._closed = threading.Event()
        self._abandoned = False
        self._beats: dict[int, tuple[bytes, float]] = {}  # what each other rank's last was, and when it came
        self._listened = 0.0
        self._beating = threading.Thread(target=self._keep_beating, name="isthmus-beat", daemon=True)
        self._beating.start()

    # ---- words and tensors, from rank 0 to the others

    def join(self) -> bool:
        """Not at rank 0: whether there is a federation, which rank 0 knows."""
        try:
            return bool(self.hear("federated", "alone")["kind"] == "federated")
        except FederationError:
            self.close(0.0)
            raise

    def say(self, kind: str, **content: str) -> None:
        self._reach(lambda: self._store.set(f"word/{self._words}", json.dumps({"kind": kind, **content})))
        self._words += 1

    def hear(self, *kinds: str) -> Word:
        """Waits for rank 0's next word, which must be of one of these kinds."""
        key = f"word/{self._words}"
        word: Word = json.loads(self._until(lambda: self._peek(key)))
        # The last one to read a word takes it away.
        if self._reach(lambda: self._store.add(f"{key}/read", 1)) == self.size - 1:
            self._reach(lambda: self._store.delete_key(key) and self._store.delete_key(f"{key}/read"))
        self._words += 1
        if word["kind"] not in kinds:
            raise FederationError(
                f"rank {self.rank} has lost step with rank 0: every rank must go through the same rounds,"
                " and call rnd.submit() in each"
            )
        return word

    def place(self, tensors: Iterable[torch.Tensor]) -> None:
        self._device = _broadcast_device(tensors)

    def share(self, state: State) -> None:
        header = pb.ModelHeader(tensors=specs_of(state))
        self.say("tensors", header=base64.b64encode(header.SerializeToString()).decode())
        for tensor in state.values():
            self._broadcast(tensor)

    def receive(self) -> State:
        """Takes what rank 0 shares."""
        header = pb.ModelHeader.FromString(base64.b64decode(self.hear("tensors")["header"]))
        state = {spec.name: allocate(spec) for spec in header.tensors}
        for tensor in state.values():
            self._broadcast(tensor)
        return state

    def _broadcast(self, tensor: torch.Tensor) -> None:
        # As bytes, since not every backend knows every dtype.
        data = flat(tensor).view(torch.uint8)
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            on_device = piece.to(self._device)
            try:
                distributed.broadcast(on_device, src=0)
            except RuntimeError as error:
                self.check()  # where a rank has said why it has gone, that says more
                raise RankGoneError(
                    f"another rank of this client has gone during a broadcast: {_line(error)}"
                ) from None
            if self.rank and on_device is not piece:
                piece.copy_(on_device)

    # ---- what all ranks agree on

    def told_to_stop(self, own: bool) -> bool:
        if self._stop_known:
            return True
        key = f"stop/{self._questions}"
        count = self._reach(lambda: self._store.add(key, 1 + (_STOP if own else 0)))

        def everybody() -> int | None:
            total = count if count % _STOP == self.size else self._reach(lambda: self._store.add(key, 0))
            return total if total % _STOP == self.size else None

        total = self._until(
            everybody,
            GIVE_UP_AFTER,
            "not every rank has asked for rnd.should_stop: all must ask equally often in a round",
        )
        if self.rank == 0 and self._questions:  # nobody needs the one before any more
            self._reach(lambda: self._store.delete_key(f"stop/{self._questions - 1}"))
        self._questions += 1
        if total >= _STOP:
            self._stop_known = True
            self.stopping.set()
        return self._stop_known

    def check(self) -> None:
        if announced := self._peek("failed"):
            failed = json.loads(announced)
            if failed["rank"] != self.rank:
                raise RankGoneError(f"rank {failed['rank']} of this client has gone: {failed['reason']}")
        self._listen()

    def others_told_to_stop(self) -> bool:
        return self._peek("stop") is not None

    def fail(self, error: BaseException | None) -> None:
        if self._closed.is_set() or isinstance(error, RankGoneError):
            return  # the others know
        reason = "the script has left its loop" if error is None else one_line(error)
        try:
            if not self._store.check(["failed"]):
                self._store.set("failed", json.dumps({"rank": self.rank, "reason": reason}))
        except RuntimeError:
            log.debug("the store has gone before this rank")

    def close(self, patience: float) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._beating.join()
        try:
            heard = self._store.add("heard", 1)
            # Rank 0 may take the store with it, and with the store what it has said last.
            until = time.monotonic() + patience
            while self.rank == 0 and heard < self.size and time.monotonic() < until:
                time.sleep(_LONGEST_PAUSE / 4)
                heard = self._store.add("heard", 0)
        except RuntimeError as error:
            log.debug("while the ranks parted: %s", _line(error))

    def abandon(self) -> None:
        self._closed = threading.Event()
        self._closed.set()
        self._abandoned = True

    # ---- waiting

    def _until(self, probe: Callable[[], T | None], seconds: float | None = None, complaint: str = "") -> T:
        """Return what the probe finds, as soon as it finds something."""
        pause, since = _SHORTEST_PAUSE, time.monotonic()
        stop_passed_on = False
        while (found := probe()) is None:
            self.check()
            if self.rank and self.stopping.is_set() and not stop_passed_on:
                self._reach(lambda: self._store.set("stop", "1"))
                stop_passed_on = True
            if seconds is not None and time.monotonic() - since > seconds:
                raise FederationError(complaint)
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)
        return found

    def _listen(self) -> None:
        """Raises where another rank is silent. Only time spent listening counts: the job may have been suspended."""
        now = time.monotonic()
        if now - self._listened < _BEAT_SECONDS:
            return
        attentive, self._listened = now - self._listened < 3 * _BEAT_SECONDS, now
        for rank in set(range(self.size)) - {self.rank}:
            beat = self._peek(f"beat/{rank}") or b""
            last, since = self._beats.get(rank, (b"", now))
            if beat != last or not attentive or rank not in self._beats:
                self._beats[rank] = (beat, now)
            elif now - since > _SILENCE:
                raise RankGoneError(f"rank {rank} of this client has been silent for {now - since:.0f} s")

    def _keep_beating(self) -> None:
        for beat in itertools.count():
            try:
                self._store.set(f"beat/{self.rank}", str(beat))
            except RuntimeError:
                return  # whoever waits will notice
            if self._closed.wait(_BEAT_SECONDS):
                return

    def _peek(self, key: str) -> bytes | None:
        """Return what is under a key, without waiting for it."""
        return self._reach(lambda: self._store.get(key) if self._store.check([key]) else None)

    def _reach(self, action: Callable[[], T]) -> T:
        """Does something with the store, which ends with the process that holds it."""
        if self._abandoned:
            raise FederationError(IN_A_FORK)
        try:
            return action()
        except RuntimeError as error:
            if isinstance(error, FederationError):
                raise
            raise RankGoneError(f"another rank of this client has gone: {_line(error)}") from None


def _broadcast_device(tensors: Iterable[torch.Tensor]) -> torch.device:
    """Return where the default process group wants what it broadcasts: in main memory, if it can do that."""
    kinds = [part.partition(":")[0] for part in distributed.get_backend_config().split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return next((tensor.device for tensor in tensors if tensor.device.type in kinds), torch.device(kinds[0]))


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
