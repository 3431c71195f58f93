"""Anything in any order: requests, crashes, lost answers, time. At most one living array, and no wrong end."""

import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from isthmus_bridge.pools import NoSuchPool
from isthmus_bridge.slurm.states import meaning

from .world import NAME, Crash, World

ANSWERS = st.sampled_from(["ok", "heard", "slow", "lost", "refused", "full", "crash-before", "crash-after"])


class Machine(RuleBasedStateMachine):
    """One key, one bridge that may die at each commit, one Slurm."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.asked = False
        self.cancelled = False
        self.size = 2

    @initialize(answers=st.lists(ANSWERS, min_size=1, max_size=4))
    def start(self, answers: list[str]) -> None:
        self.world = World(Path(self.folder.name))
        self.world.slurm.script = answers
        self._survive("ensure")

    def _survive(self, action: str) -> None:
        try:
            getattr(self, f"_{action}")()
        except Crash:
            self.world.boot()

    def _ensure(self) -> None:
        self.asked = True
        self.world.ensure()

    def _cancel(self) -> None:
        self.cancelled = True
        self.world.cancel()

    def _shrink(self) -> None:
        with suppress(NoSuchPool):
            self.world.shrink(self.size)

    def _tick(self) -> None:
        self.world.tick(7.0)

    @rule()
    def ensure(self) -> None:
        self._survive("ensure")

    @rule()
    def cancel(self) -> None:
        self._survive("cancel")

    @rule(size=st.integers(1, 3))
    def shrink(self, size: int) -> None:
        self.size = size
        self._survive("shrink")

    @rule(times=st.integers(1, 12))
    def time_passes(self, times: int) -> None:
        for _ in range(times):
            self._survive("tick")

    @rule(commits=st.integers(0, 5))
    def will_die(self, commits: int) -> None:
        assert self.world.journal is not None
        self.world.journal.commits_left = commits

    @rule(action=st.sampled_from(["ensure", "cancel", "shrink"]))
    def another_thread_does_it_in_the_middle(self, action: str) -> None:
        self.world.slurm.interrupts.append(self._shrink if action == "shrink" else getattr(self.world, action))

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

    @precondition(lambda self: self.world.slurm.living(NAME))
    @rule(
        state=st.sampled_from(["RUNNING", "COMPLETED", "FAILED", "NODE_FAIL", "SUSPENDED", "PENDING"]),
        index=st.integers(0, 2),
    )
    def a_task_moves_on(self, state: str, index: int) -> None:
        array = next(array for array in self.world.slurm.arrays if array.lives)
        if index < len(array.states) and not meaning(array.states[index]).over:
            array.states[index] = state

    @invariant()
    def at_most_one_lives(self) -> None:
        if hasattr(self, "world"):
            assert self.world.slurm.doubles == 0
            assert len(self.world.slurm.living(NAME)) <= 1

    @invariant()
    def what_is_over_is_over(self) -> None:
        if not hasattr(self, "world") or self.world.journal is None:
            return
        for entry in self.world.journal.since(self.world.identity.uri, 0):
            if entry.state.over:
                assert not self.world.slurm.living(NAME), f"{entry.state}, yet its array lives"

    def teardown(self) -> None:
        if hasattr(self, "world") and self.world.journal is not None:
            # Left alone with a healthy Slurm, everything comes to its place.
            self.world.journal.commits_left = None
            self.world.slurm.down = self.world.slurm.accounts_down = ""
            self.world.slurm.script, self.world.slurm.interrupts = [], []
            self.world.boot()
            self.world.tick(15.0, times=10)
            known = self.world.journal.get(NAME.removeprefix("isthmus-"))
            if known is not None:
                assert self.world.phase() not in ("SUBMITTING", "UNKNOWN")
                assert self.world.slurm.living(NAME) == ([] if known.state.over else [known.array_id])
                surplus = [s for array in self.world.slurm.arrays for s in array.states[known.pool_spec().replicas :]]
                assert known.state.over or all(meaning(state).over for state in surplus)
            self.world.journal.close()
        self.folder.cleanup()


Machine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMachine = Machine.TestCase
