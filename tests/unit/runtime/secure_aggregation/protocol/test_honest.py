"""The protocol of secure aggregation among honest clients, some of which drop out."""

import pytest

from isthmus.secure_aggregation.parameters import Phase

from .secure_federation import Federation, equal


@pytest.mark.parametrize("clients", [3, 5, 16, 33, 100])
def test_the_opened_sum_is_the_sum_of_the_updates(clients: int) -> None:
    job = Federation.of(clients)
    job.run()
    assert job.server.phase is Phase.DONE, job.server.failure
    assert len(job.folded) == clients
    assert equal(job.opened(), job.expected())
    assert not job.server.faults
