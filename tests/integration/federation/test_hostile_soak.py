"""Clients with valid certificates that make every attack there is, in a loop: the job does not notice."""

from bench.soak.__main__ import HOSTILE, measure, problems
from bench.soak.attacks import MESSAGES
from bench.soak.floods import FLOODS


def test_a_job_among_hostile_clients_makes_the_same_model() -> None:
    """A short one of ``python -m bench.soak``, which also tells what it costs."""
    rounds = 10
    line = measure(rounds, turn=3)
    assert problems(line, rounds) == []
    assert line["kinds"] == len(MESSAGES) + len(FLOODS)
    assert line["attacks"] >= line["kinds"] * len(HOSTILE)
