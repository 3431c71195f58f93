"""The callers' operations on pools. Each request is recorded first; submission and reconciliation follow later."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.wire.parties import PartyError
from isthmus_contracts.wire.pki import Credentials

from ..parties import party_files
from ..policy.authorization import Denial, decide, draining, too_many
from ..policy.current import CurrentPolicy
from ..policy.policy import Identity, Policy
from ..users.pool_directory import PoolDirectory, pool_directory
from ..users.user_checks import fault
from .audit_events import Auditor
from .journal import Entry, Journal, State
from .spec_checks import check_credentials, check_key, check_spec, differences, digest

log = logging.getLogger(__name__)

_MAX_REASON = 400
DAY = 86400.0
# Keys that one caller may cancel before requesting them. Each keeps a row, so that a late request starts nothing.
MAX_TOMBSTONES = 10_000


class NoSuchPool(Exception):
    """The caller has no pool with this key."""


class KeyTaken(Exception):
    """The key belongs to another caller."""


class SpecDiffers(Exception):
    """The key exists with another spec. ``str()`` names the fields."""


class NothingLeft(Exception):
    """A pool cannot be shrunk to nothing. ``str()`` is one line."""


class Denied(Exception):
    """The policy forbids the request. ``transient``: it may be allowed later."""

    def __init__(self, denial: Denial, *, transient: bool = False) -> None:
        super().__init__(str(denial))
        self.denial = denial
        self.transient = transient


class Pools:
    """The requests of the bridge protocol, independent of gRPC."""

    def __init__(
        self,
        current_policy: CurrentPolicy,
        journal: Journal,
        auditor: Auditor,
        advance: Callable[[str], None],
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``advance`` starts work on a key and returns at once; ``wake`` makes the reconciler poll the queue soon."""
        self._current_policy = current_policy
        self._journal = journal
        self._auditor = auditor
        self._advance = advance
        self._wake = wake
        self._clock = clock
        self._keys = _KeyLocks()

    @property
    def _policy(self) -> Policy:
        return self._current_policy.policy

    def ensure(self, identity: Identity, key: str, spec: pb.PoolSpec) -> Entry:
        """Record the pool if its key is new, and return its entry.

        Raises RequestError, Denied, KeyTaken, SpecDiffers, ``OSError``.
        """
        check_key(key)
        check_spec(spec)
        with self._keys.held(key):
            entry = self._journal.get(key)
            if entry is not None:
                return self._again(identity, entry, spec)
            if denial := draining(self._policy, identity):
                raise Denied(denial, transient=True)
            grant = decide(self._policy, identity, spec)
            if isinstance(grant, Denial):
                raise Denied(grant)
            if grant.user and (why := fault(grant.user)):
                raise Denied(Denial("identities.user", f"{why}; the policy maps {identity.uri} to this user"))
            entry = self._record(identity, key, spec, grant.user)
        log.info(
            "recorded",
            extra={
                "key": key,
                "pool": title(spec),
                "replicas": spec.replicas,
                "caller": identity.uri,
                **({"user": entry.user} if entry.user else {}),
            },
        )
        self._advance(key)
        self._wake()
        return entry

    def _record(self, identity: Identity, key: str, spec: pb.PoolSpec, user: str) -> Entry:
        run = pool_directory(self._policy, key, user)
        # Before the entry: a recorded pool can be submitted at any time, also by a bridge that starts after a crash.
        # A script without an entry means that the journal was lost or restored from a backup: the array may exist.
        known = run.create({**_credentials(spec.federation), **self._party_files(spec)})
        now = self._clock()
        entry = Entry(
            key=key,
            identity=identity.uri,
            state=State.UNKNOWN if known else State.RESERVED,
            spec=_without_credentials(spec),
            digest=digest(spec),
            created_at=now,
            unknown_since=now if known else 0.0,
            message="looking for the array in Slurm: the journal has lost this pool" if known else "",
            user=user,
        )
        with self._journal.transaction():
            live = self._journal.live_specs(identity.uri)
            recent = self._journal.count_since(identity.uri, now - DAY)
            everyone = self._journal.live_specs()
            denial = too_many(self._policy, identity, spec, live, recent, everyone)
            if denial is None:
                # Before the entry: a recorded pool is submitted whatever happens here.
                self._auditor.accepted(identity.uri, key, spec, user)
                return self._journal.insert(entry)
        if known:
            run.forget_credentials()
        else:
            run.remove()
        raise Denied(denial, transient=True)

    def _again(self, identity: Identity, entry: Entry, spec: pb.PoolSpec) -> Entry:
        if entry.identity != identity.uri:
            raise KeyTaken(entry.key)
        if entry.digest and entry.digest != digest(spec):
            names = ", ".join(differences(pb.PoolSpec.FromString(entry.spec), spec))
            raise SpecDiffers(f"key {entry.key} exists with another spec; it differs in: {names}")
        if entry.spec and not entry.state.over:
            # Tasks that start later read the newest credentials.
            self._directory(entry).write_credentials({**_credentials(spec.federation), **self._trust(entry)})
        return entry

    def _party_files(self, spec: pb.PoolSpec) -> Mapping[str, bytes]:
        """Return the files for secure aggregation of a new pool. Raises Denied, ``OSError``."""
        try:
            return party_files.for_new_pool(self._policy, spec)
        except PartyError as error:
            raise Denied(Denial("privacy.secure_aggregation", str(error))) from None

    def _trust(self, entry: Entry) -> Mapping[str, bytes]:
        """Return the pool's present trust file; none, and a line in the log, if it cannot be made."""
        try:
            return party_files.renewed(self._policy, entry.pool_spec())
        except (OSError, PartyError) as error:
            log.error("cannot renew the clients' trust file: %s", error)
            return {}

    def _directory(self, entry: Entry) -> PoolDirectory:
        return pool_directory(self._policy, entry.key, entry.user)

    def tail(self, entry: Entry, index: int, lines: int, limit: int) -> str:
        """Return the last lines of a client's log, or a line that says why there are none. Raises ``OSError``."""
        return self._directory(entry).log_tail(index, lines, limit)

    def get(self, identity: Identity, key: str) -> Entry:
        """Return the entry of the caller's pool. Raises RequestError, NoSuchPool."""
        check_key(key)
        entry = self._journal.get(key)
        if entry is None or entry.identity != identity.uri:
            raise NoSuchPool(key)
        return entry

    def cancel(self, identity: Identity, key: str, reason: str) -> Entry:
        """Record that the pool must end, and return its entry. Raises RequestError, NoSuchPool, Denied."""
        check_key(key)
        message = "cancelled" + (f": {_one_line(reason)}" if reason else "")
        with self._keys.held(key):
            entry = self._journal.get(key)
            now = self._clock()
            if entry is None:
                if self._journal.count_tombstones(identity.uri) >= MAX_TOMBSTONES:
                    why = f"{identity.uri} has cancelled {MAX_TOMBSTONES} keys that it never requested"
                    raise Denied(Denial("tombstones", why), transient=True)
                log.info("cancelled before it was requested", extra={"key": key, "caller": identity.uri})
                entry = self._journal.insert(
                    Entry(key=key, identity=identity.uri, state=State.CANCELLED, cancel=True, message=message,
                          created_at=now, finished_at=now, user=identity.user or "")
                )  # fmt: skip
                # If the journal was lost, an array of this key may exist: the sweep cancels it.
                self._wake()
                return entry
            if entry.identity != identity.uri:
                raise NoSuchPool(key)
            if entry.state.over or entry.cancel:
                return entry
            entry = self._journal.update(key, cancel=True, message=message)
        log.info("cancellation recorded", extra={"key": key, "reason": message, "caller": identity.uri})
        self._advance(key)
        self._wake()
        return entry

    def end_all(self, caller: str, reason: str) -> list[str]:
        """Record that all live pools of a caller must end, and return their keys."""
        message = f"ended by the site's admin: {_one_line(reason)}"
        ended = []
        for entry in self._journal.live():
            with self._keys.held(entry.key):
                found = self._journal.get(entry.key)
                if found is None or found.identity != caller or found.state.over or found.cancel:
                    continue
                self._journal.update(entry.key, cancel=True, message=message)
            log.info("cancellation recorded", extra={"key": entry.key, "reason": message, "caller": caller})
            ended.append(entry.key)
            self._advance(entry.key)
        self._wake()
        return ended

    def shrink(self, identity: Identity, key: str, replicas: int) -> Entry:
        """Record that only the first ``replicas`` clients stay. Raises RequestError, NoSuchPool, NothingLeft."""
        check_key(key)
        if replicas < 1:
            raise NothingLeft(f"key {key}: a pool keeps at least one client; CancelPool ends it")
        with self._keys.held(key):
            entry = self.get(identity, key)
            if entry.state.over or entry.cancel or not entry.spec or replicas >= entry.pool_spec().replicas:
                return entry
            entry = self._journal.update(key, kept_replicas=replicas)
        log.info("shrinking recorded", extra={"key": key, "replicas": replicas, "caller": identity.uri})
        self._wake()
        return entry

    def renew(self, identity: Identity, request: pb.RenewCredentialsRequest) -> Entry:
        """Replace the credentials of a live pool. Raises RequestError, NoSuchPool, ``OSError``."""
        check_key(request.key)
        check_credentials(request)
        with self._keys.held(request.key):
            entry = self.get(identity, request.key)
            if entry.spec and not entry.state.over:
                self._directory(entry).write_credentials({**_credentials(request), **self._trust(entry)})
                log.info("credentials renewed", extra={"key": entry.key, "caller": identity.uri})
        return entry

    def wait(self, key: str, done: Callable[[Entry], bool], timeout: float) -> Entry | None:
        """Wait until ``done`` returns true, at most ``timeout`` seconds; return the entry, if there is one."""
        deadline = time.monotonic() + timeout
        with self._journal.changed:
            while True:
                entry = self._journal.get(key)
                left = deadline - time.monotonic()
                if entry is None or done(entry) or left <= 0:
                    return entry
                self._journal.changed.wait(left)


class _KeyLocks:
    """One lock for each key in use: requests for the same key run one after another."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def held(self, key: str) -> Iterator[None]:
        with self._guard:
            lock, users = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._locks[key]
                if users == 1:
                    del self._locks[key]
                else:
                    self._locks[key] = (lock, users - 1)


def _credentials(holder: pb.Federation | pb.RenewCredentialsRequest) -> Mapping[str, bytes]:
    return Credentials(holder.ca_certificate, holder.certificate, holder.private_key).files()


def _without_credentials(spec: pb.PoolSpec) -> bytes:
    plain = pb.PoolSpec()
    plain.CopyFrom(spec)
    for secret in ("ca_certificate", "certificate", "private_key"):
        plain.federation.ClearField(secret)
    return plain.SerializeToString()


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:_MAX_REASON]


def title(spec: pb.PoolSpec) -> str:
    """Return a pool's namespace, job and name, as log lines show them."""
    return f"{spec.namespace}/{spec.job}/{spec.pool}"
