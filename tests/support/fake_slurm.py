"""A fake Slurm, a controllable clock, and a bridge that can be killed at any commit."""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from isthmus_bridge.audit.log import AuditLog
from isthmus_bridge.metrics import Metrics
from isthmus_bridge.policy.current import CurrentPolicy
from isthmus_bridge.policy.policy import Identity, Policy, parse
from isthmus_bridge.pools.audit_events import Auditor
from isthmus_bridge.pools.journal import Entry, Journal
from isthmus_bridge.pools.pool_status import to_pool
from isthmus_bridge.pools.pools import Pools
from isthmus_bridge.pools.reconciler import Reconciler
from isthmus_bridge.pools.submitter import Submitter
from isthmus_bridge.slurm.model import (
    Patience,
    SiteDescription,
    SlurmAdapter,
    SlurmError,
    Submission,
    SubmissionAmbiguous,
    SubmissionRefused,
    TaskRecord,
)
from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.slurm_states import meaning

OPERATOR = "isthmus://operator/prod"
KEY = "0123456789abcdef0123456789abcdef"
NAME = f"isthmus-{KEY}"
Slurm = TypeVar("Slurm", bound=SlurmAdapter)
PEM = b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"


class Crash(BaseException):
    """Simulated SIGKILL of the bridge."""


def policy(root: Path, **changes: object) -> Policy:
    """Return the policy of a small site."""
    return parse(
        {
            "site": "test",
            "run_dir": str(root / "run"),
            "journal": str(root / "journal.db"),
            "tls_dir": str(root / "tls"),
            "identities": [{"uri": OPERATOR}, {"uri": "isthmus://operator/other"}],
            "partitions": ["main", "debug"],
            "environments": {"plain": {"prefix": ["env"]}},
            "slurm": {"poll_seconds": 1, "absence_seconds": 30, "absence_lookups": 3},
            **changes,
        }
    )


def spec(**changes: object) -> pb.PoolSpec:
    """Return a well-formed request for three tasks."""
    fields: dict[str, object] = {
        "job_uid": "5e2b-uid",
        "namespace": "default",
        "job": "fashion",
        "pool": "lumi",
        "attempt": 1,
        "replicas": 3,
        "first_client": 2,
        "total_clients": 5,
        "time_limit_seconds": 600,
        "cpus_per_task": 1,
        "memory_mib": 100,
        "environment": "plain",
        "command": ["python3", "-m", "train"],
        "federation": pb.Federation(
            endpoint="aggregator.example:7443",
            server_name="5e2b-uid.aggregator.isthmus.dev",
            ca_certificate=PEM,
            certificate=PEM,
            private_key=PEM,
        ),
    }
    fields.update(changes)
    return pb.PoolSpec(**fields)  # type: ignore[arg-type]


@dataclass
class Array:
    """One array of the fake Slurm."""

    id: int
    name: str
    states: list[str]
    exit_codes: list[int]
    submitted: float
    user: str = ""
    directory: str = ""
    visible: bool = True
    visible_at: float = 0.0

    @property
    def lives(self) -> bool:
        """True while any task has not ended."""
        return any(not meaning(state).over for state in self.states)


@dataclass
class FakeSlurm:
    """Slurm in memory whose answers the tests control."""

    clock: Callable[[], float]
    arrays: list[Array] = field(default_factory=list)
    down: str = ""
    accounts_down: str = ""
    keeps_accounts: bool = True
    sbatch_runs: bool = False
    submissions: int = 0
    doubles: int = 0
    """Submissions under a name that has a live array, which must never happen."""
    interrupts: list[Callable[[], object]] = field(default_factory=list)
    """Actions of other threads during the next calls."""
    # Outcomes of the next submissions: ok, lost, heard, slow, late, refused, full, crash-before, crash-after.
    script: list[str] = field(default_factory=list)
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(100))

    def submit(self, submission: Submission) -> int:
        """Submit, or fail as the script says."""
        self._interrupt()
        self.submissions += 1
        self.doubles += any(array.lives and array.visible for array in self.arrays if array.name == submission.name)
        what = self.script.pop(0) if self.script else "ok"
        if what == "refused":
            raise SubmissionRefused("Slurm refused: Invalid account")
        if what == "full":
            raise SubmissionRefused("Slurm refused: job submit limit", Patience.QUEUE)
        if what == "crash-before":
            raise Crash
        if what == "late account":
            raise SubmissionRefused("Slurm refused: Invalid account or account/partition combination", Patience.HOUR)
        if what == "no room":
            raise SubmissionAmbiguous("Slurm has no room for it: sleeping and retrying", waiting=True)
        if what == "lost":
            raise SubmissionAmbiguous("sbatch did not answer in time")
        array = Array(
            next(self.ids),
            submission.name,
            ["PENDING"] * submission.tasks,
            [0] * submission.tasks,
            self.clock(),
            submission.user,
            str(submission.directory),
            visible=what != "late",
            # A request that waits in the controller's own queue, for less time than the bridge looks for it.
            visible_at=self.clock() + 20.0 if what == "slow" else 0.0,
        )
        self.arrays.append(array)
        if what == "crash-after":
            raise Crash
        if what in ("heard", "late", "slow"):
            raise SubmissionAmbiguous("sbatch did not answer in time")
        return array.id

    def submission_may_run(self, directory: Path) -> bool:
        """Return the value that the test has set."""
        return self.sbatch_runs

    def jobs(self, users: Collection[str] = ()) -> Sequence[TaskRecord]:
        """Return the records of all visible arrays."""
        self._interrupt()
        if self.down:
            raise SlurmError(self.down)
        seen = [array for array in self.arrays if array.visible and self.clock() >= array.visible_at]
        return [record for array in seen if array.user in ("", *users) for record in _records(array)]

    def history(self, names: Sequence[str], since: float, user: str = "") -> Sequence[TaskRecord]:
        """Return the records of all tasks that have ended."""
        self._interrupt()
        if self.accounts_down:
            raise SlurmError(self.accounts_down)
        if not self.keeps_accounts:
            return []
        mine = [array for array in self.arrays if array.name in names and array.user == user]
        records = [record for array in mine for record in _records(array)]
        return [record for record in records if meaning(record.state).over]

    def cancel(self, name: str, array_id: int, first: int = 0, last: int | None = None, user: str = "") -> None:
        """End an array, or a range of its tasks, at once."""
        if self.down:
            raise SlurmError(self.down)
        for array in self.arrays:
            if (array.id, array.name, array.user) == (array_id, name, user):
                end = len(array.states) if last is None else last + 1
                array.states = [
                    "CANCELLED" if first <= i < end and not meaning(s).over else s for i, s in enumerate(array.states)
                ]

    def describe(self) -> SiteDescription:
        """Return a fixed description."""
        return SiteDescription("22.05.8", "fake", "sacct", 1001)

    def partitions(self) -> list[str]:
        """Return fixed partitions."""
        return ["debug", "main"]

    def _interrupt(self) -> None:
        if self.interrupts:
            self.interrupts.pop(0)()

    def living(self, name: str = NAME) -> list[int]:
        """Return the ids of the live arrays with that name."""
        return [array.id for array in self.arrays if array.name == name and array.lives]

    def living_tasks(self, name: str = NAME) -> list[int]:
        """Return the indices of their live tasks."""
        states = [each for array in self.arrays if array.name == name for each in enumerate(array.states)]
        return [index for index, state in states if not meaning(state).over]


def _records(array: Array) -> list[TaskRecord]:
    waiting = tuple(i for i, state in enumerate(array.states) if state == "PENDING")
    records = (
        [
            TaskRecord(
                array.id,
                array.id,
                array.name,
                waiting,
                "PENDING",
                "Resources",
                user=array.user,
                directory=array.directory,
            )
        ]
        if waiting
        else []
    )
    for index, state in enumerate(array.states):
        if state != "PENDING":
            records.append(
                TaskRecord(
                    array.id + index, array.id, array.name, (index,), state, exit_code=array.exit_codes[index],
                    submitted=array.submitted, start=array.submitted + 1, node="n1", user=array.user,
                    directory=array.directory,
                )
            )  # fmt: skip
    return records


class CrashingJournal(Journal):
    """Journal that crashes the bridge after the commit that the test has chosen."""

    commits_left: int | None = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Count the outermost transactions, and crash after the chosen one."""
        outermost = not self._connection.in_transaction
        with super().transaction():
            yield
        if outermost and self.commits_left is not None:
            self.commits_left -= 1
            if self.commits_left < 0:
                raise Crash


class AnyWorld(Generic[Slurm]):
    """A bridge, its clock, and any kind of Slurm."""

    def __init__(self, root: Path, slurm: Slurm, now: float, **policy_changes: object) -> None:
        self.now = now
        self.policy = policy(root, **policy_changes)
        self.slurm = slurm
        self.journal: CrashingJournal | None = None
        self.audit_log: AuditLog | None = None
        self.boot()

    def clock(self) -> float:
        """Return the time of the bridge's clock."""
        return self.now

    @property
    def identity(self) -> Identity:
        """The caller's identity."""
        return self.policy.identities[0]

    def boot(self) -> None:
        """Start or restart the bridge from the state on disk."""
        if self.journal is not None:
            self.journal.close()
        self.journal = CrashingJournal(self.policy.journal_path, self.clock)
        self.metrics = Metrics()
        self.current_policy = CurrentPolicy(self.policy)
        if self.audit_log is not None:
            self.audit_log.close()
        self.audit_log = AuditLog(self.policy.audit_path, self.clock)
        self.auditor = Auditor(self.audit_log, self.clock)
        self.submitter = Submitter(
            self.current_policy, self.journal, self.slurm, self.metrics, self.auditor, self.clock
        )
        advance = self.submitter.advance
        self.reconciler = Reconciler(
            self.policy,
            self.journal,
            self.slurm,
            self.submitter,
            self.metrics,
            self.auditor,
            advance,
            self.clock,
            self.clock,
        )
        self.pools = Pools(self.current_policy, self.journal, self.auditor, advance, clock=self.clock)

    def ensure(self, key: str = KEY, **changes: object) -> Entry:
        """Ensure the pool, as EnsurePool does."""
        return self.pools.ensure(self.identity, key, spec(**changes))

    def cancel(self, key: str = KEY) -> Entry:
        """Cancel the pool, as CancelPool does."""
        return self.pools.cancel(self.identity, key, "deleted")

    def shrink(self, replicas: int, key: str = KEY) -> Entry:
        """Shrink the pool, as ShrinkPool does."""
        return self.pools.shrink(self.identity, key, replicas)

    def entry(self, key: str = KEY) -> Entry:
        """Return the journal's entry."""
        assert self.journal is not None
        entry = self.journal.get(key)
        assert entry is not None
        return entry

    def pool(self, key: str = KEY) -> pb.Pool:
        """Return the pool as callers see it."""
        return to_pool(self.entry(key))

    def phase(self, key: str = KEY) -> str:
        """Return the name of the pool's phase."""
        return pb.Pool.Phase.Name(self.pool(key).phase)

    def tick(self, seconds: float = 1.0, times: int = 1) -> None:
        """Advance the clock step by step, with a pass of the reconciler after each."""
        for _ in range(times):
            self.now += seconds
            self.reconciler.tick()


class World(AnyWorld[FakeSlurm]):
    """A bridge and its clock, with the fake Slurm."""

    def __init__(self, root: Path, **policy_changes: object) -> None:
        super().__init__(root, FakeSlurm(self.clock), 1_000_000.0, **policy_changes)

    def array(self, name: str = NAME) -> Array:
        """Return the only array with that name."""
        (array,) = (array for array in self.slurm.arrays if array.name == name)
        return array


@contextmanager
def checked_world(directory: Path, **policy_changes: object) -> Iterator[World]:
    """Yield the bridge's parts over a fake Slurm; raise AssertionError at the end if a client ran twice."""
    world = World(directory, **policy_changes)
    yield world
    assert world.slurm.doubles == 0
    assert world.journal is not None
    world.journal.close()
