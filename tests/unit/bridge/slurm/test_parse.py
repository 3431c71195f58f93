"""Parsing of real answers of Slurm 22.05, and of forged ones."""

import re

import pytest

from isthmus_bridge.files.run_directory import PATTERN_KEY
from isthmus_bridge.slurm import parse
from isthmus_bridge.slurm.model import SlurmError
from isthmus_contracts.identities import slurm_job_name

S = parse.new_separator()


def row(*fields: str) -> str:
    return S.join(fields) + S + "\n"


WAITING = row(
    "17",
    "17",
    "2-9",
    "isthmus-bbbb        ",
    "PENDING",
    "0",
    "0",
    "1795436990",
    "1795440590",
    "1795436929",
    "",
    "1001",
    "Resources",
    "/run/bbbb",
)
RUNNING = row(
    "18",
    "17",
    "0",
    "isthmus-bbbb",
    "RUNNING",
    "0",
    "1",
    "1795436930",
    "1795440530",
    "1795436929",
    "n1",
    "1001",
    "None",
    "/run/bbbb",
)
FAILED = row(
    "19",
    "17",
    "1",
    "isthmus-bbbb",
    "FAILED",
    "1792",
    "0",
    "1795436930",
    "1795436940",
    "1795436929",
    "n2",
    "1001",
    "NonZeroExitCode",
    "/run/bbbb",
)
REST = row(
    "17",
    "17",
    "N/A",
    "isthmus-bbbb",
    "CANCELLED",
    "0",
    "0",
    "N/A",
    "N/A",
    "1795436929",
    "",
    "1001",
    "Resources",
    "/run/bbbb",
)
STRANGER = row(
    "3",
    "N/A",
    "N/A",
    "interactive, |odd|",
    "RUNNING",
    "0",
    "0",
    "1",
    "2",
    "1",
    "n1",
    "1001",
    "ReqNodeNotAvail, Unavail:n[1-2]",
    "/home/x|y z",
)


def test_squeue() -> None:
    waiting, running, failed, rest, other = parse.squeue(
        WAITING + RUNNING + FAILED + REST + STRANGER + "\n", S, {1001: ""}
    )
    assert (waiting.indices, waiting.reason, waiting.start) == (tuple(range(2, 10)), "Resources", 1795436990.0)
    assert (running.job_id, running.array_id, running.indices, running.node) == (18, 17, (0,), "n1")
    assert (running.restarts, running.reason) == (1, "")
    assert (running.directory, other.directory) == ("/run/bbbb", "/home/x|y z")
    # Only a running task has an end: for a pending one it is a guess, and for a failed one it is past.
    assert [record.ends for record in (waiting, running, failed, rest)] == [0.0, 1795440530.0, 0.0, 0.0]
    assert (failed.exit_code, failed.signal, failed.reason) == (7, 0, "NonZeroExitCode")
    assert (rest.indices, rest.start) == (None, 0.0)


@pytest.mark.parametrize(
    "text",
    [
        "slurm_load_jobs error\n",
        row("17", "17", "0", "isthmus-bbbb", "RUNNING"),
        WAITING.replace("2-9", "2-"),
        WAITING.replace("2-9", "0-99999999"),
        RUNNING.replace("18", "x"),
        "squeue: warning\n" + RUNNING,
        RUNNING[:-40],
        WAITING + RUNNING[: RUNNING.index("RUNNING") - len(S)],
        WAITING + RUNNING[: RUNNING.index("RUNNING")],
        (WAITING + RUNNING).replace("\n", ""),
    ],
    ids=range(10),  # the texts contain a random separator
)
def test_what_is_not_understood_raises(text: str) -> None:
    with pytest.raises(SlurmError):
        parse.squeue(text, S, {1001: ""})


@pytest.mark.parametrize(
    ("expression", "indices"),
    [("3", (3,)), ("0-2", (0, 1, 2)), ("0,4-8:2%3", (0, 4, 6, 8)), ("[1-2]", (1, 2)), ("N/A", None), ("", None)],
)
def test_indices(expression: str, indices: tuple[int, ...] | None) -> None:
    assert parse.expand(expression) == indices


@pytest.mark.parametrize(
    ("text", "code", "signal"), [("1280", 5, 0), ("15", 0, 15), ("3:0", 3, 0), ("0:9", 0, 9), ("0", 0, 0), ("", 0, 0)]
)
def test_exit_status(text: str, code: int, signal: int) -> None:
    assert parse.exit_status(text) == (code, signal)


def accounts(*fields: str) -> str:
    return row(*fields)


def test_sacct_of_slurmdbd() -> None:
    text = accounts("7_3", "12", "isthmus-b", "CANCELLED by 0", "0:15", "n1", "1", "2", "None", "0")
    text += accounts("7_[4-6%2]", "7", "isthmus-b", "PENDING", "0:0", "None assigned", "1", "Unknown", "Priority", "0")
    one, many = parse.sacct(text, S, frozenset({"isthmus-b"}), 0)
    assert (one.job_id, one.array_id, one.indices, one.state, one.signal) == (12, 7, (3,), "CANCELLED", 15)
    assert (many.indices, many.node) == ((4, 5, 6), "")


def test_sacct_of_the_completion_log_names_no_index_and_others_jobs_are_left_out() -> None:
    text = accounts("24", "24", "isthmus-b", "FAILED", "2:0", "n1", "1", "2", "", "0")
    text += accounts("25", "25", "isthmus-b", "COMPLETED", "0:0", "n1", "1", "2", "", "1234")
    text += accounts("26", "26", "other", "COMPLETED", "0:0", "n1", "1", "2", "", "0")
    (record,) = parse.sacct(text, S, frozenset({"isthmus-b"}), 0)
    assert (record.job_id, record.indices, record.exit_code) == (24, None, 2)


def test_squeue_shows_the_longest_name_of_ours_in_full() -> None:
    longest = "k" * 63
    assert re.fullmatch(PATTERN_KEY, longest) and not re.fullmatch(PATTERN_KEY, longest + "k")
    assert len(slurm_job_name(longest)) < parse.NAME_WIDTH
    assert f",Name:{parse.NAME_WIDTH}{S}," in parse.squeue_format(S)


ODD = [
    "x\ny",
    "x\x1fy",
    "\x1f" * 12,
    "isthmus-bbbb\n",
    "\nisthmus-bbbb",
    "x\n" + RUNNING.replace(S, "\x1f"),
    "\n\n",
    "",
]


@pytest.mark.parametrize("name", ODD)
def test_a_job_of_any_name_neither_spoils_the_queue_nor_passes_for_ours(name: str) -> None:
    odd = STRANGER.replace("interactive, |odd|", name)
    for text in (odd + RUNNING, RUNNING + odd, RUNNING + odd + odd):
        found = parse.squeue(text, S, {1001: ""})
        assert [record.job_id for record in found if record.name == "isthmus-bbbb"] == [18]


@pytest.mark.parametrize("name", ODD)
def test_a_job_of_any_name_neither_spoils_the_accounts_nor_passes_for_ours(name: str) -> None:
    odd = accounts("24", "24", name, "FAILED", "2:0", "n1", "1", "2", "", "0")
    ours = accounts("25", "25", "isthmus-bbbb", "FAILED", "2:0", "n1", "1", "2", "", "0")
    for text in (odd + ours, ours + odd):
        assert [record.job_id for record in parse.sacct(text, S, frozenset({"isthmus-bbbb"}), 0)] == [25]


def test_separators_are_unpredictable() -> None:
    assert len({parse.new_separator() for _ in range(100)}) == 100
    assert not any(set(parse.new_separator()) & set(",:% \n") or parse.new_separator()[0].isdigit() for _ in range(100))
