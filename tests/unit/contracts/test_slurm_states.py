import pytest

from isthmus_contracts.slurm_states import DISPLACED, MEANINGS, UNLISTED, Meaning, meaning, normal

# squeue(1) of 22.05, "JOB STATE CODES", and what 23.02 to 25.11 added.
DOCUMENTED = (
    "BOOT_FAIL CANCELLED COMPLETED CONFIGURING COMPLETING DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PENDING PREEMPTED"
    " RUNNING RESV_DEL_HOLD REQUEUE_FED REQUEUE_HOLD REQUEUED RESIZING REVOKED SIGNALING SPECIAL_EXIT STAGE_OUT STOPPED"
    " SUSPENDED TIMEOUT LAUNCH_FAILED RECONFIG_FAIL POWER_UP_NODE UPDATE_DB EXPEDITING"
)


@pytest.mark.parametrize("state", DOCUMENTED.split())
def test_every_documented_state_has_a_meaning(state: str) -> None:
    assert state in MEANINGS


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("PENDING", Meaning.WAITING),
        ("POWER_UP_NODE", Meaning.WAITING),
        ("EXPEDITING", Meaning.WAITING),
        ("UPDATE_DB", Meaning.RUNNING),
        ("REQUEUE_HOLD", Meaning.WAITING),
        ("COMPLETING", Meaning.RUNNING),
        ("SUSPENDED", Meaning.RUNNING),
        ("COMPLETED", Meaning.SUCCEEDED),
        ("OUT_OF_MEMORY", Meaning.FAILED),
        ("CANCELLED", Meaning.CANCELLED),
        ("A_STATE_OF_THE_FUTURE", Meaning.RUNNING),
    ],
)
def test_meanings(state: str, expected: Meaning) -> None:
    assert meaning(state) is expected


def test_what_is_over() -> None:
    assert {m for m in Meaning if m.over} == {Meaning.SUCCEEDED, Meaning.FAILED, Meaning.CANCELLED}
    assert MEANINGS.keys() >= UNLISTED
    assert {meaning(state) for state in DISPLACED} == {Meaning.FAILED}


@pytest.mark.parametrize(("text", "word"), [("CANCELLED by 1000", "CANCELLED"), ("RUNNING+", "RUNNING"), ("", "")])
def test_normal(text: str, word: str) -> None:
    assert normal(text) == word
