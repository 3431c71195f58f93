"""States in slurmrestd's answers."""

import pytest

from isthmus_bridge.slurm.rest.format import HIDDEN_FLAGS, SHOWN_FLAGS, state_of
from isthmus_contracts.slurm_states import LOST, MEANINGS

# Slurm's enum job_states; all other states are flags beside one of these.
BASE_STATES = (
    "PENDING RUNNING SUSPENDED COMPLETED CANCELLED FAILED TIMEOUT NODE_FAIL PREEMPTED BOOT_FAIL DEADLINE OUT_OF_MEMORY"
)


def test_every_state_is_a_base_state_or_a_declared_flag() -> None:
    assert sorted([*BASE_STATES.split(), *SHOWN_FLAGS, *HIDDEN_FLAGS]) == sorted(MEANINGS.keys() - {LOST})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("RUNNING", "RUNNING"),
        (["RUNNING"], "RUNNING"),
        (["CANCELLED", "COMPLETING"], "COMPLETING"),
        (["PENDING", "EXPEDITING"], "EXPEDITING"),
        (["RUNNING", "UPDATE_DB"], "RUNNING"),
        (["UPDATE_DB", "RUNNING"], "RUNNING"),
        (["RUNNING", "CONFIGURING", "POWER_UP_NODE"], "CONFIGURING"),
        (["POWER_UP_NODE", "PENDING"], "PENDING"),
        (["UPDATE_DB"], "UPDATE_DB"),
    ],
)
def test_the_state_is_the_one_that_squeue_shows(value: object, expected: str) -> None:
    assert state_of(value) == expected
