"""Tests of the circuit breaker."""

from isthmus_operator.effects.circuit_breaker import FAILURES, FIRST_PAUSE, LONGEST_PAUSE, CircuitBreaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def tripped(clock: Clock) -> CircuitBreaker:
    breaker = CircuitBreaker(clock)
    for _ in range(FAILURES):
        assert breaker.admits()
        breaker.failed("silence")
    return breaker


def test_it_opens_after_failures_in_a_row_only() -> None:
    breaker = CircuitBreaker(Clock())
    for _ in range(FAILURES - 1):
        assert not breaker.failed("silence")
    assert not breaker.succeeded()
    for _ in range(FAILURES - 1):
        assert not breaker.failed("silence")
    assert not breaker.is_open
    assert breaker.failed("silence")
    assert breaker.is_open
    assert not breaker.admits()


def test_one_call_tries_it_after_a_pause_that_grows_to_a_bound() -> None:
    clock = Clock()
    breaker = tripped(clock)
    pauses = []
    for _ in range(6):
        pause = 0.0
        while not breaker.admits():
            clock.now += 1.0
            pause += 1.0
        assert not breaker.admits()  # one at a time
        breaker.failed("silence")
        pauses.append(pause)
    assert pauses == [FIRST_PAUSE, 10.0, 20.0, 40.0, LONGEST_PAUSE, LONGEST_PAUSE]


def test_the_first_answer_closes_it() -> None:
    clock = Clock()
    breaker = tripped(clock)
    clock.now += FIRST_PAUSE
    assert breaker.admits()
    assert breaker.succeeded()
    assert [breaker.admits(), breaker.admits(), breaker.is_open] == [True, True, False]


def test_a_trial_that_broke_off_lets_the_next_one_try() -> None:
    clock = Clock()
    breaker = tripped(clock)
    clock.now += FIRST_PAUSE
    assert breaker.admits()
    breaker.abandoned()
    assert breaker.admits()
