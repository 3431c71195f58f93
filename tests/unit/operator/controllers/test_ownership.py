"""Tests of the choice between several operators of a job."""

import datetime as dt
from dataclasses import replace

import pytest

from isthmus_operator.controllers.ownership import EXPIRES_AFTER, RENEWED_AFTER, identity, other, renewal
from tests.support.fake_cluster import NOW, job

SECOND = dt.timedelta(seconds=1)


def test_the_first_one_takes_it_and_keeps_it_while_it_renews() -> None:
    taken = job(operator=renewal(job(), "a", NOW))
    assert (other(taken, "b", NOW), other(taken, "a", NOW), other(job(), "b", NOW)) == ("a", "", "")
    assert renewal(taken, "a", NOW + RENEWED_AFTER - SECOND) == ""
    later = NOW + RENEWED_AFTER
    renewed = job(operator=renewal(taken, "a", later))
    assert renewed.operator != taken.operator
    assert other(renewed, "b", later + EXPIRES_AFTER - SECOND) == "a"
    assert other(renewed, "b", later + EXPIRES_AFTER) == ""


def test_a_copied_or_damaged_or_future_annotation_is_ignored() -> None:
    taken = job(operator=renewal(job(), "a", NOW + dt.timedelta(days=1)))
    assert other(taken, "b", NOW) == ""
    copied = replace(job(operator=renewal(job(), "a", NOW)), uid="another")
    assert other(copied, "b", NOW) == ""
    for text in ("x", "5", "[]", "{}", '{"uid":5}', '{"renewed":"x"}'):
        assert other(job(operator=text), "b", NOW) == ""
        assert renewal(job(operator=text), "b", NOW)


@pytest.mark.parametrize(
    ("one", "another", "same"),
    [(("c", "isthmus", ()), ("c", "isthmus", ("team",)), True),  # an upgrade changed the scope
     (("c", "isthmus", ()), ("c", "team", ("team",)), False),
     (("c", "isthmus", ()), ("d", "isthmus", ()), False),
     (("c", "", ("a", "b")), ("c", "", ("b", "a")), True),
     (("c", "", ()), ("c", "", ("a",)), False)],
)  # fmt: skip
def test_settings_with_the_same_identity(
    one: tuple[str, str, tuple[str, ...]], another: tuple[str, str, tuple[str, ...]], same: bool
) -> None:
    assert (identity(*one) == identity(*another)) is same
