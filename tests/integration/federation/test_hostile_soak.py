"""Clients with valid certificates that run all attacks in a loop: the job is unaffected."""

from bench.soak.__main__ import HOSTILE, measure, problems
from bench.soak.attacks import MESSAGES
from bench.soak.floods import FLOODS


def test_a_job_among_hostile_clients_makes_the_same_model() -> None:
    """A short run of ``python -m bench.soak``, which also measures the cost."""
    rounds = 10
    line = measure(rounds, turn=3)
    assert problems(line, rounds) == []
    assert line["kinds"] == len(MESSAGES) + len(FLOODS)
    assert line["attacks"] >= line["kinds"] * len(HOSTILE)
