"""Property test of the bridge: requests, crashes, lost answers and time in any order.

At most one array is live, and no pool has a wrong end. The properties hold for every Slurm:
``tests/unit/bridge/pools/test_machine.py`` runs them with the fake one, ``tests/slurm`` with a real one.
"""

import tempfile
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from isthmus_bridge.pools.pools import NoSuchPool
from isthmus_bridge.slurm.model import SlurmAdapter
from isthmus_contracts.identities import slurm_job_name

from .fake_slurm import KEY, AnyWorld, Crash

ANSWERS = st.sampled_from(["ok", "heard", "slow", "lost", "refused", "full", "crash-before", "crash-after"])


class DisturbedSlurm(SlurmAdapter, Protocol):
    """Slurm adapter whose faults the tests control, and whose state they can read."""

    script: list[str]
    """Outcomes of the next submissions."""
    interrupts: list[Callable[[], object]]
    """Actions of other threads during the next calls."""
    down: str
    accounts_down: str
    keeps_accounts: bool

    @property
    def doubles(self) -> int:
        """Number of duplicate submissions."""
        ...

    def living(self, name: str) -> list[int]:
        """Return the ids of the live arrays with that name."""
        ...

    def living_tasks(self, name: str) -> list[int]:
        """Return the indices of their live tasks."""
        ...


Slurm = TypeVar("Slurm", bound=DisturbedSlurm)


class AnyMachine(RuleBasedStateMachine, Generic[Slurm]):
    """State machine of one key, a bridge that may die at each commit, and a Slurm."""

    key = KEY
    wanted: dict[str, object] = {}
    """Fields of the request that differ from the defaults."""

    def __init__(self, parent: Path | None = None) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=parent is not None)
        self.size = 2

    @abstractmethod
    def begin(self, folder: Path) -> AnyWorld[Slurm]:
        """Create the bridge, its clock and its Slurm."""

    @abstractmethod
    def settle(self) -> None:
        """Let the bridge run until its state agrees with Slurm's."""

    @property
    def name(self) -> str:
        """Name of the arrays."""
        return slurm_job_name(self.key)

    @initialize(answers=st.lists(ANSWERS, min_size=1, max_size=4))
    def start(self, answers: list[str]) -> None:
        self.world = self.begin(Path(self.folder.name))
        self.world.slurm.script = answers
        self._survive(self._ensure)

    def _survive(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Crash:
            self.world.boot()

    def _ensure(self) -> None:
        self.world.ensure(self.key, **self.wanted)

    def _cancel(self) -> None:
        self.world.cancel(self.key)

    def _shrink(self) -> None:
        with suppress(NoSuchPool):
            self.world.shrink(self.size, self.key)

    @rule()
    def ensure(self) -> None:
        self._survive(self._ensure)

    @rule()
    def cancel(self) -> None:
        self._survive(self._cancel)

    @rule(size=st.integers(1, 3))
    def shrink(self, size: int) -> None:
        self.size = size
        self._survive(self._shrink)

    @rule(times=st.integers(1, 12))
    def time_passes(self, times: int) -> None:
        for _ in range(times):
            self._survive(partial(self.world.tick, 7.0))

    @rule(commits=st.integers(0, 5))
    def will_die(self, commits: int) -> None:
        assert self.world.journal is not None
        self.world.journal.commits_left = commits

    @rule(action=st.sampled_from(["ensure", "cancel", "shrink"]))
    def another_thread_does_it_in_the_middle(self, action: str) -> None:
        self.world.slurm.interrupts.append(getattr(self, f"_{action}"))

    @rule(answers=st.lists(ANSWERS, min_size=1, max_size=2))
    def sbatch_will_answer(self, answers: list[str]) -> None:
        self.world.slurm.script += answers

    @rule()
    def restart(self) -> None:
        self.world.boot()

    @rule(down=st.booleans(), accounts=st.booleans(), keeps=st.booleans())
    def slurm_comes_and_goes(self, down: bool, accounts: bool, keeps: bool) -> None:
        self.world.slurm.down = "away" if down else ""
        self.world.slurm.accounts_down = "away" if accounts else ""
        self.world.slurm.keeps_accounts = keeps

    @invariant()
    def at_most_one_lives(self) -> None:
        if hasattr(self, "world"):
            assert self.world.slurm.doubles == 0, f"submitted once too often: {self.world.slurm.doubles} times"
            living = self.world.slurm.living(self.name)
            assert len(living) <= 1, f"they live all: {living}"

    @invariant()
    def what_is_over_is_over(self) -> None:
        if not hasattr(self, "world") or self.world.journal is None:
            return
        entry = self.world.journal.get(self.key)
        if entry is not None and entry.state.over:
            assert not self.world.slurm.living(self.name), f"{entry.state}, yet its array lives"

    def teardown(self) -> None:
        if hasattr(self, "world") and self.world.journal is not None:
            # With a healthy Slurm, the state converges.
            self.heal()
            self.settle()
            self.world.journal.close()
        self.folder.cleanup()

    def heal(self) -> None:
        """Remove all faults for the rest of the example."""
        assert self.world.journal is not None
        self.world.journal.commits_left = None
        self.world.slurm.down = self.world.slurm.accounts_down = ""
        self.world.slurm.script, self.world.slurm.interrupts = [], []

    def disagreement(self) -> str:
        """Return the differences between journal and Slurm; empty if they agree."""
        assert self.world.journal is not None
        known = self.world.journal.get(self.key)
        if known is None:
            return ""
        living, tasks = self.world.slurm.living(self.name), self.world.slurm.living_tasks(self.name)
        said = f"{known.state} with array {known.array_id}; Slurm: {living}, tasks {tasks}"
        if self.world.phase(self.key) in ("SUBMITTING", "UNKNOWN"):
            return f"unsettled: {said}"
        if living != ([] if known.state.over else [known.array_id]):
            return f"the wrong arrays live: {said}"
        surplus = not known.state.over and any(index >= known.pool_spec().replicas for index in tasks)
        return f"too many tasks live: {said}" if surplus else ""
