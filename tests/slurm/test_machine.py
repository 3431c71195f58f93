"""The bridge's state machine with a real Slurm: a few examples for each outcome of the first sbatch.

They are the same in every run; ISTHMUS_MACHINE=20 runs twenty others of each instead.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from tests.support.bridge_state_machine import AnyMachine
from tests.support.fake_slurm import AnyWorld

from .fault_injection import DisturbedCli
from .slurm_site import slurm, until

EXAMPLES = int(os.environ.get("ISTHMUS_MACHINE", "0"))
# Most examples run sbatch only once, so each outcome of the first gets its own examples.
FIRST = ["ok", "heard", "slow", "lost", "crash-before", "crash-after"]


class Machine(AnyMachine[DisturbedCli]):
    """State machine in which the tests control the bridge's clock, while Slurm's clock runs normally."""

    wanted = {"command": ["sleep", "300"], "memory_mib": 10}

    def __init__(self, parent: Path, arrays: list[str], first: str) -> None:
        super().__init__(parent)
        self.first = first
        # Slurm remembers the arrays of earlier examples.
        self.key = secrets.token_hex(16)
        arrays.append(self.name)

    def begin(self, folder: Path) -> AnyWorld[DisturbedCli]:
        return AnyWorld(folder, DisturbedCli(self.first), time.time())

    @rule(
        program=st.sampled_from(["sbatch", "squeue", "scancel", "sacct"]),
        how=st.sampled_from(["unasked", "unheard", "twice", "late"]),
    )
    def an_answer_goes_astray(self, program: str, how: str) -> None:
        self.world.slurm.astray[program] = how

    @rule(how=st.sampled_from([["scancel"], ["scancel", "--batch", "--signal=TERM"], ["scontrol", "requeue"]]))
    def somebody_else_takes_a_task(self, how: list[str]) -> None:
        listed = slurm("squeue", "-h", "-r", "-t", "running", f"--name={self.name}", "-o", "%F_%K").split()
        for task in listed[:1]:
            slurm(*how, task, check=False)

    def heal(self) -> None:
        super().heal()
        self.world.slurm.astray = {}

    def settle(self) -> None:
        self.world.boot()
        if self.world.slurm.hangs:
            # A pool whose sbatch may still submit does not end, however long no array is visible.
            self.world.cancel(self.key)
            self.world.tick(15.0, times=6)
        self.world.slurm.release()
        # Check this before the bridge polls again, because it would cancel an extra array.
        self.at_most_one_lives()
        self.what_is_over_is_over()
        self._come_to("the journal and Slurm agree", lambda: not self.disagreement())
        self.world.cancel(self.key)
        self._come_to("the pool is over", lambda: self.world.entry(self.key).state.over)
        self.at_most_one_lives()
        self.what_is_over_is_over()

    def _come_to(self, end: str, reached: Callable[[], bool]) -> None:
        """Poll until ``reached`` is true: cancelled jobs end in Slurm a moment later."""

        def looked() -> bool:
            self.world.tick(15.0)
            return reached()

        try:
            until(looked, end)
        except AssertionError:
            pytest.fail(f"not so: {end}; {self.disagreement()}")


@pytest.fixture
def arrays(_cluster: None) -> Iterator[list[str]]:
    """Yield a list of job names, and cancel their jobs at the end."""
    names: list[str] = []
    yield names
    for name in names:
        slurm("scancel", f"--name={name}", check=False)
    until(lambda: not set(slurm("squeue", "-h", "-o", "%j").split()) & set(names), "the jobs are gone")


@pytest.mark.parametrize("first", FIRST)
def test_machine(folder: Path, arrays: list[str], first: str) -> None:
    bounds = settings(
        max_examples=EXAMPLES or 4, stateful_step_count=15, database=None,
        # No shrinking: Slurm is slow and not deterministic.
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def machine() -> Machine:
        return Machine(folder, arrays, first)

    chosen = machine if EXAMPLES else seed(FIRST.index(first))(machine)
    run_state_machine_as_test(chosen, settings=bounds)  # type: ignore[arg-type]
