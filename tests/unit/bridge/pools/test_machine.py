"""The state machine with the fake Slurm, which also ends tasks, and keeps accounts or does not."""

from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from isthmus_contracts.slurm_states import meaning
from tests.support.bridge_state_machine import AnyMachine
from tests.support.fake_slurm import FakeSlurm, World


class Machine(AnyMachine[FakeSlurm]):
    """State machine with a Slurm that answers at once and forgets nothing."""

    def begin(self, folder: Path) -> World:
        return World(folder)

    @precondition(lambda self: self.world.slurm.living(self.name))
    @rule(
        state=st.sampled_from(["RUNNING", "COMPLETED", "FAILED", "NODE_FAIL", "SUSPENDED", "PENDING"]),
        index=st.integers(0, 2),
    )
    def a_task_moves_on(self, state: str, index: int) -> None:
        array = next(array for array in self.world.slurm.arrays if array.lives)
        if index < len(array.states) and not meaning(array.states[index]).over:
            array.states[index] = state

    def settle(self) -> None:
        self.world.boot()
        self.world.tick(15.0, times=10)
        assert not (problem := self.disagreement()), problem


Machine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, suppress_health_check=list(HealthCheck))
TestMachine = Machine.TestCase
