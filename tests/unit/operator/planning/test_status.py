"""Tests of the status (conditions, patches, decimals) and of the record."""

import datetime as dt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus_contracts.api.federated_job_status import ConditionType, Reason
from isthmus_operator.planning.status import StatusDraft, decimal, is_urgent, merge_patch, rounded_up
from isthmus_operator.state.job_record import (
    AggregatorRecord,
    ArrayKey,
    ArrayRecord,
    ArrayState,
    ClientRecord,
    CloudRecord,
    Record,
    Setback,
)
from isthmus_operator.state.timestamps import parse_timestamp, timestamp
from tests.support.fake_cluster import NOW, job

LATER = NOW + dt.timedelta(minutes=5)


def drafted(status: dict[str, Any], now: dt.datetime, value: bool, reason: Reason) -> dict[str, Any]:
    draft = StatusDraft(job(status=status), now)
    draft.set(ConditionType.QUORUM_REACHED, value, reason, "m")
    return draft.content


def test_a_transition_time_moves_only_with_the_status() -> None:
    first = drafted({}, NOW, False, Reason.WAITING_FOR_CLIENTS)
    again = drafted(first, LATER, False, Reason.SUSPENDED)
    assert again["conditions"][0]["lastTransitionTime"] == timestamp(NOW)
    assert again["conditions"][0]["reason"] == "SuspendedByUser"
    turned = drafted(again, LATER, True, Reason.ENOUGH_CLIENTS)
    assert turned["conditions"][0]["lastTransitionTime"] == timestamp(LATER)


def test_a_condition_of_someone_else_is_never_lost() -> None:
    other = {"type": "Audited", "status": "True", "reason": "ByHand", "lastTransitionTime": timestamp(NOW)}
    content = drafted({"conditions": [other]}, NOW, True, Reason.ENOUGH_CLIENTS)
    assert content["conditions"][0] == other
    assert len(content["conditions"]) == 2


json_values = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=3)),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=2), json_values, max_size=4)


def applied(old: Any, patch: dict[str, Any]) -> dict[str, Any]:
    """Apply a merge patch as in RFC 7396."""
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = applied(result.get(key), value)
        else:
            result[key] = value
    return result


@given(old=objects, new=objects)
def test_a_patch_leads_from_old_to_new(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert applied(old, merge_patch(old, new)) == new
    assert merge_patch(new, new) == {}


def test_only_transitions_are_urgent() -> None:
    before = drafted({}, NOW, False, Reason.WAITING_FOR_CLIENTS)
    assert not is_urgent(before, {**before, "rounds": {"completed": 3}})
    assert is_urgent(before, {**before, "phase": "Running"})
    assert is_urgent(before, drafted(before, NOW, True, Reason.ENOUGH_CLIENTS))


@pytest.mark.parametrize(
    ("value", "text"), [(0.93612, "0.9361"), (1.0, "1"), (123456.0, "1.235e+05"), (1e-7, "1e-07"), (-0.5, "-0.5")]
)
def test_decimals_are_short(value: float, text: str) -> None:
    assert decimal(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (4.37701, "4.378"), (4.377, "4.377"), (127131.4, "1.272e+05"), (0.25, "0.25")]
)
def test_values_are_rounded_up(value: float, text: str) -> None:
    assert rounded_up(value) == text


def test_times() -> None:
    assert parse_timestamp("2030-01-01T00:00:00Z") == NOW
    assert timestamp(NOW) == "2030-01-01T00:00:00Z"
    assert parse_timestamp("soon") is None
    assert parse_timestamp(None) is None


client_records = st.builds(ClientRecord, st.integers(0, 2), st.integers(0, 2), st.integers(-1, 2))
records = st.builds(
    Record,
    st.dictionaries(
        st.text(max_size=4),
        st.builds(
            CloudRecord,
            st.integers(0, 9),
            st.dictionaries(st.integers(0, 9), client_records, max_size=5),
        ),
        max_size=3,
    ),
    st.dictionaries(
        st.builds(ArrayKey, st.text("ab-", max_size=4), st.integers(0, 9)),
        st.builds(
            ArrayRecord,
            st.text(max_size=5),
            st.integers(0, 9),
            st.sampled_from(ArrayState),
            setback=st.builds(Setback, st.text(max_size=4), given_up=st.sampled_from([None, Reason.QUEUE_TIMEOUT])),
        ),
        max_size=3,
    ),
    st.builds(AggregatorRecord, st.text(max_size=3), *[st.integers(0, 9)] * 3),
)


@given(record=records)
def test_a_record_survives_writing(record: Record) -> None:
    assert Record.load(record.dump()) == record


@pytest.mark.parametrize(
    "text",
    ["nonsense", "[]", '{"cloud":{"a":{}}}', '{"cloud":{"a":{"started":1,"clients":{"0":[1,2,3,4]}}}}',
     '{"hpc":{"a":{"attempt":1}}}', '{"hpc":{"a":{"site":"s","attempt":"1"}}}', '{"aggregator":{"x":1}}', "5",
     '{"hpc":{"a":{"site":"s","retiring":1}}}', '{"hpc":{"a":{"site":"s","state":"Lost"}}}',
     '{"hpc":{"a/b":{"site":"s"}}}', '{"hpc":{"a":{"site":"s","ran":true}}}', '{"attempts":{"a":-1}}',
     '{"cloud":[]}', "[" * 100_000,
     '{"cloud":{"a":{"started":Infinity,"clients":{}}}}', '{"cloud":{"a":{"started":-5,"clients":{}}}}',
     '{"cloud":{"a":{"started":1,"clients":{},"size":NaN}}}', '{"cloud":{"a":{"started":1,"clients":{"0":[-7,0,-1]}}}}',
     '{"cloud":{"a":{"started":1,"clients":{"0-":[1,0,-1]}}}}',
     '{"cloud":{"a":{"started":1,"clients":{"0-4,2":[1,0,1]}}}}',
     '{"cloud":{"a":{"started":1,"clients":{"0":[1,0,true]}}}}',
     '{"cloud":{"a":{"started":1,"clients":{"0-999999999":[1,0,-1]}}}}',
     '{"hpc":{"a":{"site":"s","setback":{"retry_at":-100000000000000000000}}}}', '{"hpc":{"a":{"site":"s","size":-3}}}',
     '{"hpc":{"a":{"site":"s","attempt":99999999999}}}', '{"hpc":{"a":{"site":"s","setback":{"given_up":"Because"}}}}'],
)  # fmt: skip
def test_a_damaged_record_is_reported(text: str) -> None:
    with pytest.raises(ValueError, match="record"):
        Record.load(text)


def test_a_record_of_many_clients_fits_into_an_annotation() -> None:
    for clients in (
        {index: ClientRecord(1) for index in range(20_000)},
        {index: ClientRecord(1 + index % 2) for index in range(20_000)},
    ):
        record = Record(cloud={"cloud": CloudRecord(20_000, clients)})
        assert len(record.dump()) < 200_000  # 262,144 for all annotations together
        assert Record.load(record.dump()) == record
    assert Record(cloud={"a": CloudRecord(9, {i: ClientRecord(i // 5) for i in (3, 0, 1, 2, 7)})}).dump() == (
        '{"cloud":{"a":{"started":9,"clients":{"0-3":[0,0,-1],"7":[1,0,-1]}}}}'
    )


def test_a_short_text_makes_no_long_record() -> None:
    pools = ",".join(f'"p{number}":{{"started":1,"clients":{{"0-99999":[1,0,-1]}}}}' for number in range(3))
    with pytest.raises(ValueError, match="one too many"):
        Record.load(f'{{"cloud":{{{pools}}}}}')


def test_a_record_of_before_runs_were_written_together_is_read() -> None:
    old = '{"cloud":{"a":{"started":2,"clients":{"0":[1,0,-1],"1":[1,0,-1]}}}}'
    assert Record.load(old) == Record(cloud={"a": CloudRecord(2, {0: ClientRecord(1), 1: ClientRecord(1)})})
