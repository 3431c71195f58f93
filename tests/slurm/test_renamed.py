"""A pool whose array is renamed in Slurm: the bridge still follows and cancels it."""

import time
from pathlib import Path

import pytest

from isthmus_contracts.pb import bridge_pb2 as pb
from isthmus_contracts.pb import bridge_pb2_grpc as rpc

from .slurm_site import OVER, Site, ensure, get, over, running, slurm, spec, until


@pytest.mark.parametrize("ends", ["by itself", "cancelled"])
def test_a_renamed_array_is_neither_lost_nor_leaked(site: Site, operator: rpc.BridgeStub, ends: str) -> None:
    key = site.key()
    stop = Path(site.settings["run_dir"]) / key / "stop"
    command = ["sh", "-c", f"until [ -e {stop} ]; do sleep 0.2; done"]
    array = ensure(operator, key, spec(command=command)).slurm_job_id
    running(operator, key)
    slurm("scontrol", "update", f"jobid={array}", "name=better")
    assert site.arrays(key) == set(), "the bridge's name is gone"
    # Longer than the time after which a missing array counts as lost.
    until_lost = time.monotonic() + 2 * float(site.settings["slurm"]["absence_seconds"])

    def stays() -> bool:
        pool = get(operator, key)
        assert (pool.phase, pool.running, pool.slurm_job_id) == (pb.Pool.RUNNING, 2, array), pool
        return time.monotonic() > until_lost

    until(stays, "the time is over after which it would count as lost")
    site.kill()
    operator = site.start()
    running(operator, key)
    if ends == "cancelled":
        operator.CancelPool(pb.CancelPoolRequest(key=key, reason="deleted"), timeout=60)
        assert over(operator, key).phase == pb.Pool.CANCELLED
    else:
        stop.touch()
        pool = over(operator, key)
        assert (pool.phase, pool.succeeded) == (pb.Pool.SUCCEEDED, 2)
    assert get(operator, key).phase in OVER
    until(lambda: not slurm("squeue", "-h", "-j", array, "-o", "%i", check=False).strip(), "nothing of it is left")


def test_an_array_that_the_site_renames_as_it_is_submitted_is_found(site: Site) -> None:
    # A job_submit.lua may set another name, regardless of the request; in addition sbatch's answer is lost.
    wrapper = site.bin / "sbatch"
    text = wrapper.read_text().replace('"$@"', '"${@/--job-name=*/--job-name=of-the-site}"')
    wrapper.write_text(text)
    operator = site.start()
    site.mode("fail-after")
    key = site.key()
    operator.EnsurePool(pb.EnsurePoolRequest(key=key, spec=spec(command=["true"])), timeout=60)
    site.mode("")
    pool = over(operator, key)
    assert (pool.phase, pool.succeeded) == (pb.Pool.SUCCEEDED, 2)
    place = f"{site.settings['run_dir']}/{key}"
    rows = [line.split("|") for line in slurm("squeue", "-h", "-t", "all", "-o", "%F|%j|%Z").splitlines()]
    assert {(job, name) for job, name, directory in rows if directory == place} == {(pool.slurm_job_id, "of-the-site")}
