"""A thousand clients in one pool: one sbatch, one squeue for all of them, and changes that arrive soon and cost little.

Prints its figures as a JSON line (run it with -s). Durations depend on the machine; the number of program runs does
not.
"""

import json
import os
import re
import time
import urllib.request
from collections import Counter
from pathlib import Path

from tests.support.ports import free_port

from .slurm_site import Site, ensure, get, slurm, spec, until

CLIENTS = 1000
SECONDS = 15.0


def processor_seconds(pid: int) -> float:
    """Return the processor time of the process and of its reaped children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def runs(port: int) -> Counter[str]:
    """Return the number of the bridge's runs of each of Slurm's programs, from its metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    pattern = r'^isthmus_bridge_slurm_command_seconds_count{[^}]*program="([^"]+)"[^}]*} ([0-9.]+)$'
    return Counter({program: int(float(count)) for program, count in re.findall(pattern, text, re.MULTILINE)})


def test_a_thousand_clients(site: Site) -> None:
    metrics = free_port()
    site.settings["metrics_listen"] = f"127.0.0.1:{metrics}"
    site.settings["limits"] = {"replicas": CLIENTS}
    site.settings["slurm"]["poll_seconds"] = 1.5  # the default
    operator = site.start()
    key = site.key()
    # Long enough that none ends by itself, even on a slow machine.
    wanted = spec(replicas=CLIENTS, total_clients=CLIENTS + 3, memory_mib=1, command=["sleep", "3000"],
                  time_limit_seconds=3600)  # fmt: skip
    job = ensure(operator, key, wanted).slurm_job_id
    until(lambda: get(operator, key).running > 1, "some run")
    # Slurm keeps tasks that it has not scheduled yet in one record. Holding them gives each its own, as if it ran.
    active = slurm("squeue", "-h", "-t", "R", "-j", job, "-o", "%K").split()
    waiting = sorted(set(range(CLIENTS)) - {int(index) for index in active})
    slurm("scontrol", "hold", ",".join(f"{job}_{index}" for index in waiting), check=False)
    records = len(slurm("squeue", "-h", "-j", job, "-o", "%i").split())
    assert records > CLIENTS * 0.9
    until(lambda: get(operator, key).reason.startswith("JobHeld"), "the bridge has seen it")

    before, calls = time.monotonic(), runs(metrics)
    used, began = processor_seconds(site.pid), time.monotonic()
    time.sleep(SECONDS)  # measure the idle load
    elapsed = time.monotonic() - began
    share = (processor_seconds(site.pid) - used) / elapsed
    calls = runs(metrics) - calls
    window = time.monotonic() - before
    slurm("scancel", f"{job}_{active[0]}")
    until(lambda: active[0] not in slurm("squeue", "-h", "-j", job, "-t", "R,CG", "-o", "%K").split(), "it has ended")
    ended = time.monotonic()
    until(lambda: get(operator, key).failed > 0, "the bridge reports it")
    delay = time.monotonic() - ended
    figures = {"clients": CLIENTS, "records": records, "sbatch": runs(metrics)["sbatch"], "squeue": calls["squeue"],
               "seconds": round(elapsed, 1), "core_share": round(share, 4),
               "reported_after": round(delay, 2)}  # fmt: skip
    print(json.dumps(figures))
    assert figures["sbatch"] == 1
    assert site.arrays(key) == {job}
    assert set(calls) == {"squeue"}, f"nothing but squeue: {calls}"
    assert 1 <= calls["squeue"] <= window / 1.5 + 1, "one squeue a poll, for all of them"
    # Do not test the figures themselves, which depend on the machine and its load: only that the bridge uses less than
    # a whole core, and that the delay is below its longest pause.
    assert share < 0.9, figures
    assert delay < 25, figures
