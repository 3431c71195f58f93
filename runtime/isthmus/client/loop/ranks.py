"""The processes (ranks) of one client whose script runs under torch.distributed.

Rank 0 holds the session. It sends its decisions to the other ranks as commands in the process group's store, which the
others poll several times a second. Only tensors are broadcast, at moments when every rank is known to take part. So no
rank waits for an offer, which may take hours, inside a collective: no gloo or NCCL timeout applies, no GPU spins,
signals are handled, and a failing rank can report its failure without the help of the others.
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
from ..errors import FORKED_PROCESS, FederationError
from ..session.session import GIVE_UP_AFTER
from .process_watch import error_line

log = logging.getLogger("isthmus")

T = TypeVar("T")
Command = dict[str, Any]

# Seconds between two polls of the store.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.2
# Each rank sends a heartbeat at this interval; a rank that is silent for longer than the timeout is considered dead or
# unreachable. Seconds.
_HEARTBEAT_SECONDS = 5.0
_HEARTBEAT_TIMEOUT = 60.0
# Maximum size of one broadcast, and so of the GPU memory that it takes beside the model. Bytes.
_BROADCAST_BYTES = 64 << 20
# A rank that wants to stop adds this to the count of ranks that have polled.
_STOP = 1 << 32
_uses = itertools.count(1)


class RankGoneError(FederationError):
    """Another rank of this client has failed or exited."""


class Ranks:
    """The ranks of a client that has only one: nothing has to be sent."""

    rank = 0

    def send_command(self, kind: str, **content: str) -> None:
        """Send the script's next step to the other ranks."""

    def share(self, state: State) -> None:
        """Send tensors to the other ranks."""

    def use_device_of(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take the device for broadcasts from the model's tensors."""

    def told_to_stop(self, own: bool) -> bool:
        """Return whether any rank was told to stop; ``own``: whether this one was. Every rank must call it."""
        return own

    def check(self) -> None:
        """Raise :class:`RankGoneError` if another rank has failed."""

    def others_told_to_stop(self) -> bool:
        """Return whether another rank was told to stop while it waited for this one."""
        return False

    def fail(self, error: BaseException | None) -> None:
        """Report that this rank has failed (``None``: it left its loop), so that no other rank waits for it.

        Does not block.
        """

    def close(self, timeout: float) -> None:
        """End communication. Rank 0 waits up to ``timeout`` seconds until the others have received everything."""

    def abandon(self) -> None:
        """Give the ranks up in a fork of this process, which shares its parent's connection to the store."""


def find_ranks(stopping: threading.Event) -> "Ranks | RankGroup":
    """Return this process's group of ranks, or a single rank if there is no process group."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return RankGroup(stopping)
    return Ranks()


class RankGroup(Ranks):
    """The ranks of the default process group. ``stopping`` is set when this rank was told to stop.

    Every method that waits raises :class:`RankGoneError` if another rank has failed or exited.
    """

    def __init__(self, stopping: threading.Event) -> None:
        # Not part of every build of torch.
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        store = _get_default_store()
        if store is None:
            raise FederationError("the process group has no store (MPI?): use the gloo or the NCCL backend")
        # Each call of rounds() has its own keys. All ranks call it equally often.
        self._store = PrefixStore(f"isthmus/{next(_uses)}", store)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.stopping = stopping
        self._device = _broadcast_device(())
        self._commands = 0
        self._stop_polls = 0
        self._stop_known = False
        self._closed = threading.Event()
        self._abandoned = False
        self._heartbeats: dict[int, tuple[bytes, float]] = {}  # by rank: the newest, and when it arrived
        self._checked = 0.0
        self._heartbeat_thread = threading.Thread(target=self._send_heartbeats, name="isthmus-heartbeat", daemon=True)
        self._heartbeat_thread.start()

    # ---- commands and tensors, from rank 0 to the others

    def join(self) -> bool:
        """Return whether there is a federation, as rank 0 reports. Not to be called at rank 0."""
        try:
            return bool(self.receive_command("federated", "alone")["kind"] == "federated")
        except FederationError:
            self.close(0.0)
            raise

    def send_command(self, kind: str, **content: str) -> None:
        command = json.dumps({"kind": kind, **content})
        self._with_store(lambda: self._store.set(f"command/{self._commands}", command))
        self._commands += 1

    def receive_command(self, *kinds: str) -> Command:
        """Wait for rank 0's next command, which must be of one of these kinds."""
        key = f"command/{self._commands}"
        command: Command = json.loads(self._wait_for(lambda: self._peek(key)))
        # The last rank to read a command deletes it.
        if self._with_store(lambda: self._store.add(f"{key}/read", 1)) == self.size - 1:
            self._with_store(lambda: self._store.delete_key(key) and self._store.delete_key(f"{key}/read"))
        self._commands += 1
        if command["kind"] not in kinds:
            raise FederationError(
                f"rank {self.rank} has lost step with rank 0: every rank must go through the same rounds,"
                " and call rnd.submit() in each"
            )
        return command

    def use_device_of(self, tensors: Iterable[torch.Tensor]) -> None:
        self._device = _broadcast_device(tensors)

    def share(self, state: State) -> None:
        header = pb.ModelHeader(tensors=specs_of(state))
        self.send_command("tensors", header=base64.b64encode(header.SerializeToString()).decode())
        for tensor in state.values():
            self._broadcast(tensor)

    def receive(self) -> State:
        """Receive the tensors that rank 0 shares."""
        header = pb.ModelHeader.FromString(base64.b64decode(self.receive_command("tensors")["header"]))
        state = {spec.name: allocate(spec) for spec in header.tensors}
        for tensor in state.values():
            self._broadcast(tensor)
        return state

    def _broadcast(self, tensor: torch.Tensor) -> None:
        # As bytes, since not every backend supports every dtype.
        data = flat(tensor).view(torch.uint8)
        for start in range(0, len(data), _BROADCAST_BYTES):
            piece = data[start : start + _BROADCAST_BYTES]
            on_device = piece.to(self._device)
            try:
                distributed.broadcast(on_device, src=0)
            except RuntimeError as error:
                self.check()  # a reason that the failed rank reported says more
                raise RankGoneError(
                    f"another rank of this client has gone during a broadcast: {_first_line(error)}"
                ) from None
            if self.rank and on_device is not piece:
                piece.copy_(on_device)

    # ---- agreement among all ranks

    def told_to_stop(self, own: bool) -> bool:
        if self._stop_known:
            return True
        key = f"stop/{self._stop_polls}"
        count = self._with_store(lambda: self._store.add(key, 1 + (_STOP if own else 0)))

        def total_of_all() -> int | None:
            total = count if count % _STOP == self.size else self._with_store(lambda: self._store.add(key, 0))
            return total if total % _STOP == self.size else None

        total = self._wait_for(
            total_of_all,
            GIVE_UP_AFTER,
            "not every rank has asked for rnd.should_stop: all must ask equally often in a round",
        )
        if self.rank == 0 and self._stop_polls:  # every rank is done with the previous poll
            self._with_store(lambda: self._store.delete_key(f"stop/{self._stop_polls - 1}"))
        self._stop_polls += 1
        if total >= _STOP:
            self._stop_known = True
            self.stopping.set()
        return self._stop_known

    def check(self) -> None:
        if announced := self._peek("failed"):
            failed = json.loads(announced)
            if failed["rank"] != self.rank:
                raise RankGoneError(f"rank {failed['rank']} of this client has gone: {failed['reason']}")
        self._check_heartbeats()

    def others_told_to_stop(self) -> bool:
        return self._peek("stop") is not None

    def fail(self, error: BaseException | None) -> None:
        if self._closed.is_set() or isinstance(error, RankGoneError):
            return  # the others know
        reason = "the script has left its loop" if error is None else error_line(error)
        try:
            if not self._store.check(["failed"]):
                self._store.set("failed", json.dumps({"rank": self.rank, "reason": reason}))
        except RuntimeError:
            log.debug("cannot report this rank's failure: the store is gone")

    def close(self, timeout: float) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._heartbeat_thread.join()
        try:
            done = self._store.add("done", 1)
            # Rank 0 may hold the store: if it exited now, its last commands would be lost.
            deadline = time.monotonic() + timeout
            while self.rank == 0 and done < self.size and time.monotonic() < deadline:
                time.sleep(_LONGEST_PAUSE / 4)
                done = self._store.add("done", 0)
        except RuntimeError as error:
            log.debug("error while closing the rank group: %s", _first_line(error))

    def abandon(self) -> None:
        self._closed = threading.Event()
        self._closed.set()
        self._abandoned = True

    # ---- waiting

    def _wait_for(self, probe: Callable[[], T | None], seconds: float | None = None, complaint: str = "") -> T:
        """Poll until ``probe`` returns a value, and return it.

        After ``seconds``, if given, raise :class:`FederationError` with ``complaint``.
        """
        pause, since = _SHORTEST_PAUSE, time.monotonic()
        stop_passed_on = False
        while (found := probe()) is None:
            self.check()
            if self.rank and self.stopping.is_set() and not stop_passed_on:
                self._with_store(lambda: self._store.set("stop", "1"))
                stop_passed_on = True
            if seconds is not None and time.monotonic() - since > seconds:
                raise FederationError(complaint)
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)
        return found

    def _check_heartbeats(self) -> None:
        """Raise :class:`RankGoneError` if another rank is silent.

        Only time in which this rank polls counts, since the job may have been suspended.
        """
        now = time.monotonic()
        if now - self._checked < _HEARTBEAT_SECONDS:
            return
        was_polling, self._checked = now - self._checked < 3 * _HEARTBEAT_SECONDS, now
        for rank in set(range(self.size)) - {self.rank}:
            heartbeat = self._peek(f"heartbeat/{rank}") or b""
            last, since = self._heartbeats.get(rank, (b"", now))
            if heartbeat != last or not was_polling or rank not in self._heartbeats:
                self._heartbeats[rank] = (heartbeat, now)
            elif now - since > _HEARTBEAT_TIMEOUT:
                raise RankGoneError(f"rank {rank} of this client has been silent for {now - since:.0f} s")

    def _send_heartbeats(self) -> None:
        for number in itertools.count():
            try:
                self._store.set(f"heartbeat/{self.rank}", str(number))
            except RuntimeError:
                return  # any thread that uses the store will raise
            if self._closed.wait(_HEARTBEAT_SECONDS):
                return

    def _peek(self, key: str) -> bytes | None:
        """Return the value of a key, or ``None`` if it is not set, without waiting for it."""
        return self._with_store(lambda: self._store.get(key) if self._store.check([key]) else None)

    def _with_store(self, action: Callable[[], T]) -> T:
        """Run an action on the store, which ends with the process that holds it.

        Raise :class:`RankGoneError` if that process is gone.
        """
        if self._abandoned:
            raise FederationError(FORKED_PROCESS)
        try:
            return action()
        except RuntimeError as error:
            if isinstance(error, FederationError):
                raise
            raise RankGoneError(f"another rank of this client has gone: {_first_line(error)}") from None


def _broadcast_device(tensors: Iterable[torch.Tensor]) -> torch.device:
    """Return the device from which the default process group broadcasts: the CPU if the backend supports it."""
    kinds = [part.partition(":")[0] for part in distributed.get_backend_config().split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return next((tensor.device for tensor in tensors if tensor.device.type in kinds), torch.device(kinds[0]))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
