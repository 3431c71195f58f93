"""Policies of real sites, with Slurm configured like these sites."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from isthmus_contracts.pb import bridge_pb2 as pb

from .slurm_site import Site, ensure, get, over, running, slurm, spec, until

if TYPE_CHECKING:
    from lab import Lab

EXAMPLES = Path(__file__).parents[2] / "bridge" / "examples" / "sites"
# The account selects the type of allocation and, with the constraint, the partition; memory follows from the cores.
JEAN_ZAY = """
local function refused(why)
   slurm.log_user("IDRIS: " .. why)
   return slurm.ERROR
end
function slurm_job_submit(job, partitions, uid)
   if job.account == nil or not string.match(job.account, "@v100$") then
      return refused("name an account of the hours, such as abc@v100")
   end
   if job.min_mem_per_node ~= nil or job.min_mem_per_cpu ~= nil then
      return refused("memory follows from the cores; do not ask for it")
   end
   if job.threads_per_core ~= 1 then
      return refused("use --hint=nomultithread")
   end
   if job.features ~= "v100-32g" then
      return refused("name the kind of nodes, -C v100-32g")
   end
   if job.partition ~= nil then
      return refused("name no partition")
   end
   job.partition = "debug"
   return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, uid)
   return slurm.SUCCESS
end
"""
Setup = Callable[..., None]


@pytest.fixture
def setup(lab: "Lab") -> Iterator[Setup]:
    """Yield a function that changes the configuration of the lab's Slurm; restore it at the end."""
    conf = lab.slurm_conf
    kept, plugin = conf.read_text(), conf.with_name("job_submit.lua")

    def restart(text: str) -> None:
        lab.stop_slurm_daemon("slurmctld")
        conf.write_text(text)
        lab.start_slurm_daemon("slurmctld")
        up = {"idle", "mixed", "allocated"}
        until(lambda: set(slurm("sinfo", "-h", "-N", "-o", "%T").split()) <= up, "the nodes are there")

    def change(added: str = "", replaced: tuple[tuple[str, str], ...] = (), lua: str = "") -> None:
        text = kept
        for pattern, new in replaced:
            text, times = re.subn(pattern, new, text)
            assert times, f"slurm.conf has no {pattern}"
        plugin.write_text(lua)
        plugin.chmod(0o644)
        restart(text + added)

    yield change
    restart(kept)
    plugin.unlink(missing_ok=True)


def opened(site: Site, name: str, environment: dict[str, Any]) -> dict[str, Any]:
    """Use the policy of a site, except for its directories, its connections and its modules."""
    content: dict[str, Any] = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    ours = ("site", "run_dir", "tls_dir", "listen", "metrics_listen", "slurm")
    for place in content["environments"].values():
        for kind in ("modules", "venv"):
            place.pop(kind, None)
        place.update(environment)
    dropped = {name: value for name, value in content.items() if name not in ("gateways", "relay", "journal")}
    site.settings = {**dropped, **{name: site.settings[name] for name in ours}}
    return site.settings


def shown(pool: pb.Pool) -> str:
    """Return Slurm's description of the pool's array."""
    return slurm("scontrol", "show", "job", pool.slurm_job_id)


def test_jean_zay(site: Site, setup: Setup) -> None:
    setup("JobSubmitPlugins=lua\n", ((r"(NodeName=n\d )Feature=\S+ ", r"\1Feature=v100-32g "),), JEAN_ZAY)
    settings = opened(site, "jean-zay", {"prefix": ["env"]})
    operator = site.start()
    code, said = site.command("doctor")
    assert code == 0 and "partitions: the policy names none; Slurm's default or a plug-in of the site" in said, said
    key, wanted = site.key(), spec(environment="v100", gres=[pb.GenericResource(name="gpu", count=1)])
    # QOS need a database, which the lab does not have; without it Slurm accepts any name.
    ensure(operator, key, wanted)
    running(operator, key)
    text = shown(get(operator, key))
    for said in ("Account=abc@v100", "Partition=debug", "QOS=", "Features=v100-32g", "gres:gpu:1"):
        assert said in text, text
    assert "Comment=isthmus default/fashion/hpc for operator/prod" in text
    # A site that is drained: the user sees the reason, and running jobs continue.
    site.reload({**settings, "drain": "maintenance on 3 June"}, "the policy was reloaded; changed: drain")
    with pytest.raises(Exception, match="policy drain: this site takes no new jobs for now: maintenance on 3 June"):
        ensure(operator, site.key(), wanted)
    assert pb.Pool.Phase.Name(get(operator, key).phase) == "RUNNING"
    code, said = site.command("end", "--identity", "isthmus://operator/prod", "--reason", "a key has leaked")
    assert (code, said.splitlines()) == (0, [key, "1 pools of isthmus://operator/prod are being ended"])
    pool = over(operator, key)
    assert (pb.Pool.Phase.Name(pool.phase), pool.message) == (
        "CANCELLED", "ended by the site's admin: a key has leaked",
    )  # fmt: skip
    assert site.arrays(key) == set()


def test_jean_zay_refuses_a_policy_without_its_options(site: Site, setup: Setup) -> None:
    setup("JobSubmitPlugins=lua\n", ((r"(NodeName=n\d )Feature=\S+ ", r"\1Feature=v100-32g "),), JEAN_ZAY)
    opened(site, "jean-zay", {"prefix": ["env"], "sbatch": None})["sbatch"] = None
    operator = site.start()
    pool = ensure(operator, key := site.key(), spec(environment="v100"))
    pool = over(operator, key)
    assert "IDRIS: memory follows from the cores; do not ask for it" in pool.message


def test_parallelcluster(site: Site, setup: Setup) -> None:
    """Slurm manages no memory at this site, so it refuses a job that requests some."""
    replaced = (
        ("SelectTypeParameters=.*", "SelectTypeParameters=CR_CPU"), ("DefMemPerCPU=.*\n", ""), ("RealMemory=\\d+", ""),
        (r"(NodeName=n1 )Feature=\S+ ", r"\1Feature=g5.12xlarge "),
        (r"(NodeName=n2 )Feature=\S+ ", r"\1Feature=g6.12xlarge "), ("PartitionName=main ", "PartitionName=gpu "),
    )  # fmt: skip
    setup(replaced=replaced)
    settings = opened(site, "parallelcluster", {"prefix": ["env"]})
    operator = site.start()
    key = site.key()
    wanted = spec(environment="isthmus", memory_mib=2000, gres=[pb.GenericResource(name="gpu", count=1)])
    ensure(operator, key, wanted)
    running(operator, key)
    text = shown(get(operator, key))
    assert "Partition=gpu" in text and "Features=g5.12xlarge|g6.12xlarge" in text and "OverSubscribe=NO" in text
    # Whole instances: two clients need two nodes.
    assert set(re.findall(r" NodeList=(\S+)", text)) == {"n1", "n2"}
    site.reload({**settings, "sbatch": None}, "the policy was reloaded; changed: sbatch")
    pool = ensure(operator, second := site.key(), wanted)
    pool = over(operator, second)
    assert "Memory specification can not be satisfied" in pool.message
