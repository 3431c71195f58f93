"""The comparison of Slurm's limits with the policy's in `doctor`, from answers in the format of Slurm 22.05."""

import re
import tempfile
from pathlib import Path

import pytest

from isthmus_bridge.admin import site_limits
from isthmus_bridge.admin.site_limits import seconds_of
from isthmus_bridge.slurm.model import SiteDescription
from tests.integration.bridge.test_cli_adapter import programs
from tests.support.fake_slurm import OPERATOR, policy

PARTITION = (
    "PartitionName={name} AllowGroups=ALL AllowAccounts={accounts} AllowQos=ALL AllocNodes=ALL Default=NO QoS=N/A"
    " MaxTime={time} RootOnly=NO State=UP DefMemPerNode=UNLIMITED {memory} TRES=cpu=8,mem=16000M,node=2"
)
WITH_ACCOUNTS = SiteDescription("22.05.8", "lab", "sacct", 1001)
WITHOUT = SiteDescription("22.05.8", "lab", "", 1001)


def partition(
    name: str, time: str = "UNLIMITED", memory: str = "MaxMemPerNode=UNLIMITED", accounts: str = "ALL"
) -> str:
    return PARTITION.format(name=name, time=time, memory=memory, accounts=accounts)


def examine(
    parent: Path, rows: list[str], associations: str = "", described: SiteDescription = WITHOUT, **changes: object
) -> list[tuple[bool | None, str]]:
    folder = Path(tempfile.mkdtemp(dir=parent))
    (folder / "partitions").write_text("\n".join(rows) + "\n")
    (folder / "associations").write_text(associations)
    bin_dir = programs(
        folder, scontrol=f"cat {folder}/partitions", sacctmgr=f'echo "$@" >{parent}/asked; cat {folder}/associations'
    )
    limits = {"time_limit_seconds": 7200, "memory_mib": 4096, "cpus_per_task": 2, "replicas": 8}
    settings = {"limits": limits, "slurm": {"bin_dir": str(bin_dir)}, **changes}
    return list(site_limits.examine(policy(folder, **settings), described))


def test_partitions_that_take_everything(tmp_path: Path) -> None:
    (first, *rest) = examine(tmp_path, [partition("main"), partition("debug", "2:00:00", "MaxMemPerCPU=2048")])
    assert first == (True, "partitions: Slurm's MaxTime and memory limits accept all that the policy allows")
    assert [well for well, _ in rest] == [None]


def test_a_limit_above_that_of_one_partition_is_a_note_and_of_all_a_problem(tmp_path: Path) -> None:
    short, small = partition("debug", "00:30:00"), partition("main", "1-00:00:00", "MaxMemPerNode=4000")
    lines = dict(line[::-1] for line in examine(tmp_path, [short, small]))
    time = "partitions: limits.time_limit_seconds is 7200, but Slurm allows less (MaxTime): debug 1800 s;"
    memory = (
        "partitions: limits.memory_mib is 4096, but Slurm allows less (MaxMemPerNode or MaxMemPerCPU): main 4000 MiB;"
    )
    assert lines[f"{time} larger pools never start"] is None
    assert lines[f"{memory} larger pools never start"] is None
    only = examine(tmp_path, [small], partitions=["main"])
    assert (False, f"{memory} larger pools never start") in only


def test_memory_that_is_not_asked_for_and_partitions_that_are_not_named(tmp_path: Path) -> None:
    small = partition("main", "1-00:00:00", "MaxMemPerNode=4000")
    lines = examine(tmp_path, [small], partitions=["main"], sbatch={"memory": "none"})
    assert (True, "partitions: Slurm's MaxTime and memory limits accept all that the policy allows") in lines
    assert not [line for _, line in examine(tmp_path, [small], partitions=[]) if "may also use" in line]


def test_a_callers_own_limit_counts(tmp_path: Path) -> None:
    short = partition("main", "1-00:00:00")
    own = [{"uri": OPERATOR}, {"uri": "isthmus://operator/other", "limits": {"time_limit_seconds": 172800}}]
    lines = examine(tmp_path, [short], partitions=["main"], identities=own)
    assert any("limits.time_limit_seconds is 172800, but Slurm allows less" in line for _, line in lines)


def test_partitions_that_the_jobs_could_use_beyond_the_policy(tmp_path: Path) -> None:
    lines = examine(tmp_path, [partition("main"), partition("urgent"), partition("closed", accounts="chief")])
    (further,) = (line for _, line in lines if "may also use" in line)
    assert "its jobs may also use the partitions urgent, which the policy does not name" in further
    assert any("no associations (slurmdbd): Slurm does not limit" in line for _, line in lines)


def test_associations_below_and_above_the_policy(tmp_path: Path) -> None:
    rows = "\n".join(["physics||normal,high|01:00:00|4|cpu=1,mem=2G", "chief||normal|||"])
    lines = examine(tmp_path, [partition("main")], rows, WITH_ACCOUNTS, accounts=["physics", "maths"], qos=["normal"])
    said = {line.partition(": ")[2] if line.startswith("user ") and ", account" not in line.partition(":")[0]
            else line.partition(", ")[2]: well for well, line in lines if line.startswith("user ")}  # fmt: skip
    assert said == {
        "accounts of the policy that Slurm does not allow: maths": False,
        "Slurm allows its jobs more than the policy's accounts: chief; remove them with sacctmgr": None,
        "Slurm allows its jobs more than the policy's qos: high; remove them with sacctmgr": None,
        "account physics: MaxWall is 3600 s, but limits.time_limit_seconds 7200": False,
        "account physics: MaxSubmitJobs is 4, but limits.replicas 8: each task counts": False,
        "account physics: MaxTRESPerJob has mem=2G, but limits.memory_mib is 4096": False,
        "account physics: MaxTRESPerJob has cpu=1, but limits.cpus_per_task is 2": False,
    }
    # It asks for this cluster only, not for the database's other clusters.
    assert re.search(r"show assoc user=\S+ cluster=lab format=", (tmp_path / "asked").read_text())
    ((_, missing),) = (line for line in examine(tmp_path, [partition("main")], "", WITH_ACCOUNTS) if line[0] is False)
    assert "has no association in Slurm" in missing


def test_without_the_programs_nothing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_limits, "DEFAULT_PATH", str(tmp_path))
    ((well, line),) = site_limits.examine(policy(tmp_path), WITHOUT)
    assert (well, line) == (
        None, "limits: cannot compare them with Slurm's: scontrol is not in PATH; set slurm.bin_dir to its folder"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("UNLIMITED", None), ("", None), ("30", 1800), ("30:15", 1815), ("1:00:00", 3600), ("2-00:00:00", 172800),
     ("1-12", 129600)],
)  # fmt: skip
def test_slurms_times(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds
