"""Policies of real sites, the resulting sbatch command lines, and the options that only an admin can set."""

from pathlib import Path

import pytest
import yaml

from isthmus_bridge.cli import main
from isthmus_bridge.files.run_directory import RunDirectory
from isthmus_bridge.policy.authorization import Grant, decide
from isthmus_bridge.policy.policy import Policy, PolicyError, load
from isthmus_bridge.pools.submitter import submission
from isthmus_bridge.slurm import options
from isthmus_bridge.slurm.cli import OWN_ARGUMENTS, arguments
from isthmus_bridge.slurm.model import Gres
from isthmus_bridge.slurm.options import Options
from isthmus_bridge.slurm.pyslurm.adapter import description
from isthmus_bridge.slurm.rest import format as rest_format
from isthmus_contracts.pb import bridge_pb2 as pb
from tests.integration.bridge.test_cli_adapter import submission as any_submission
from tests.support.fake_slurm import KEY, OPERATOR, policy, spec
from tests.unit.bridge.admin.test_command_line import policy_file

SITES = Path(__file__).parents[4] / "bridge" / "examples" / "sites"
OTHER = "isthmus://operator/other"


def gpus(count: int, kind: str = "") -> list[pb.GenericResource]:
    return [pb.GenericResource(name="gpu", type=kind, count=count)]


def command_line(site: Policy, caller: int = 0, **wanted: object) -> str:
    """Return the arguments of sbatch that the policy decides."""
    request = spec(**wanted)
    grant = decide(site, site.identities[caller], request)
    assert isinstance(grant, Grant), grant
    asked = submission(site, KEY, site.identities[caller].uri, request, grant, RunDirectory(site.run_dir, KEY))
    return " ".join(argument for argument in arguments(asked) if argument.startswith(OWN_ARGUMENTS))


COMMAND_LINES: list[tuple[str, int, dict[str, object], str]] = [
    (
        "perlmutter",
        0,
        {"environment": "gpu", "cpus_per_task": 32, "memory_mib": 57344, "gres": gpus(1)},
        "--mem=57344M --account=m1234 --qos=shared --gpus-per-task=1 --constraint=gpu --licenses=scratch",
    ),
    (
        "perlmutter",
        0,
        # Four clients share a whole node.
        {"environment": "gpu-80gb", "qos": "regular", "account": "m1234_g", "clients_per_job": 4, "replicas": 4,
         "total_clients": 9, "cpus_per_task": 32, "memory_mib": 57344, "gres": gpus(1)},
        "--mem=229376M --account=m1234_g --qos=regular --gpus-per-task=1 --constraint=gpu&hbm80g --licenses=scratch",
    ),
    (
        "jean-zay",
        0,
        {"environment": "v100", "cpus_per_task": 10, "gres": gpus(1)},
        "--account=abc@v100 --qos=qos_gpu-t3 --gres=gpu:1 --constraint=v100-32g --hint=nomultithread",
    ),
    (
        "jean-zay",
        1,
        {"environment": "a100", "cpus_per_task": 8, "gres": gpus(2)},
        "--account=abc@a100 --qos=qos_gpu_a100-t3 --gres=gpu:2 --constraint=a100 --hint=nomultithread",
    ),
    (
        "delftblue",
        0,
        {"environment": "torch", "cpus_per_task": 4, "memory_mib": 16001, "gres": gpus(1)},
        "--mem-per-cpu=4001M --partition=gpu-a100 --account=research-eemcs-insy --gpus-per-task=1",
    ),
    (
        "delftblue",
        0,
        {"environment": "torch", "partition": "compute-p2", "cpus_per_task": 4, "memory_mib": 16000},
        "--mem-per-cpu=4000M --partition=compute-p2 --account=research-eemcs-insy --threads-per-core=1",
    ),
    (
        "parallelcluster",
        0,
        {"environment": "isthmus", "cpus_per_task": 8, "memory_mib": 100, "gres": gpus(1)},
        "--partition=gpu --gpus-per-node=1 --constraint=g5.12xlarge|g6.12xlarge --exclusive",
    ),
    ("parallelcluster", 0, {"environment": "isthmus", "partition": "cpu"}, "--partition=cpu --exclusive"),
]  # fmt: skip


@pytest.mark.parametrize(("site", "caller", "wanted", "line"), COMMAND_LINES)
def test_the_command_line_of_a_site(site: str, caller: int, wanted: dict[str, object], line: str) -> None:
    assert command_line(load(SITES / f"{site}.yaml"), caller, **wanted) == line


@pytest.mark.parametrize("site", ["perlmutter", "jean-zay", "delftblue", "parallelcluster"])
def test_the_policy_of_a_site_passes_check(site: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the paths of directories and of Slurm's programs are replaced."""
    content = yaml.safe_load((SITES / f"{site}.yaml").read_text())
    assert main(["certs", "--dir", str(tmp_path / "certs"), "--host", "localhost"]) == 0
    content |= {"run_dir": str(tmp_path / "run"), "tls_dir": str(tmp_path / "certs" / "server")}
    content |= {"journal": str(tmp_path / "journal.db"), "slurm": {"bin_dir": str(tmp_path / "bin")}}
    for environment in content["environments"].values():
        if "venv" in environment:
            environment["venv"] = "/usr"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    path = tmp_path / "policy.yaml"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(content))
    assert main(["check", "--policy", str(path)]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "for one client of 1 CPU and 1024 MiB, sbatch is run with" in said and "no problems found" in said


def test_check_prints_the_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = policy_file(
        tmp_path, partitions=["main"], sbatch={"memory": "none", "qos": "q"}, partition_sbatch={"main": {"nice": 5}}
    )
    main(["check", "--policy", str(path)])
    assert "    venv: --partition=main --qos=q --nice=5\n" in capsys.readouterr().out
    main(["check", "--policy", str(policy_file(tmp_path))])
    assert "sbatch is run with" not in capsys.readouterr().out


EVERYTHING = {
    "constraint": "[rack1|rack2]&a100*1", "reservation": "r1,r2", "exclusive": "user", "wckey": "w@1",
    "licenses": "scratch,matlab@server:2", "switches": "1@2:00:00", "nodelist": "n[01-03],m", "exclude": "n04",
    "nice": -5, "hint": "nomultithread", "gres_flags": "enforce-binding", "tmp_mib": 5, "memory": "per-gpu",
    "gpus": "per-job", "qos": "q",
}  # fmt: skip


def test_every_option_reaches_sbatch(tmp_path: Path) -> None:
    site = policy(tmp_path, sbatch=EVERYTHING, limits={"gres": {"gpu": 4}})
    assert command_line(site, gres=gpus(2, "a100")) == (
        "--mem-per-gpu=50M --partition=main --qos=q --gpus=a100:2 --constraint=[rack1|rack2]&a100*1 --reservation=r1,r2"
        " --wckey=w@1 --licenses=scratch,matlab@server:2 --hint=nomultithread --switches=1@2:00:00"
        " --nodelist=n[01-03],m --exclude=n04 --exclusive=user --gres-flags=enforce-binding --nice=-5 --tmp=5M"
    )
    # Without a GPU, memory per GPU cannot be requested.
    assert command_line(site).startswith("--mem=100M --partition=main --qos=q --constraint=")


def test_the_most_specific_option_wins(tmp_path: Path) -> None:
    site = policy(
        tmp_path,
        qos=["own"],
        sbatch={"constraint": "site", "qos": "site", "wckey": "site", "exclusive": True},
        partition_sbatch={"debug": {"constraint": "partition", "nice": 1}},
        environments={"plain": {"prefix": ["env"], "sbatch": {"constraint": "environment", "exclusive": False}}},
        identities=[{"uri": OPERATOR}, {"uri": OTHER, "sbatch": {"constraint": "caller", "qos": "caller"}}],
    )
    assert command_line(site) == "--mem=100M --partition=main --qos=site --constraint=environment --wckey=site"
    assert command_line(site, 1, partition="debug") == (
        "--mem=100M --partition=debug --qos=caller --constraint=caller --wckey=site --nice=1"
    )
    assert "--qos=own" in command_line(site, qos="own")


FORMS = [
    ("constraint", "a b"), ("constraint", "--wrap=id"), ("constraint", "a\n"), ("constraint", "a;id"),
    ("constraint", ""), ("reservation", "-r"), ("reservation", "a\n"), ("wckey", "a b"), ("licenses", "a b"),
    ("licenses", "-x"), ("switches", "x"), ("nodelist", "/etc/passwd"), ("exclude", "$(id)"), ("exclusive", "topo"),
    ("hint", "x"), ("gres_flags", "x"), ("memory", "x"), ("gpus", "x"), ("nice", "x"), ("tmp_mib", -1),
    ("threads_per_core", 100), ("wrap", "id"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), FORMS)
def test_options_have_a_form(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(PolicyError, match=rf"^sbatch\.{name}"):
        policy(tmp_path, sbatch={name: value})
    if value != "":
        with pytest.raises(ValueError, match=f"malformed option '{name}'"):
            options.read({name: value})


def test_the_helper_reads_what_the_bridge_writes() -> None:
    wanted = Options(constraint="a&b", exclusive="yes", nice=-5, memory="none", threads_per_core=2)
    assert options.read(wanted.stated()) == wanted
    assert options.read({}) == Options() and Options().stated() == {}


@pytest.mark.parametrize("adapter", ["rest", "pyslurm"])
@pytest.mark.parametrize("name", ["hint", "gres_flags", "switches", "nodelist", "exclude", "tmp_mib"])
def test_options_that_an_adapter_does_not_support_are_refused(tmp_path: Path, adapter: str, name: str) -> None:
    slurm = {"adapter": adapter, "rest": {"url": "unix:/s", "token_file": "/t"}}
    with pytest.raises(PolicyError) as caught:
        policy(tmp_path, slurm=slurm, partition_sbatch={"debug": {name: EVERYTHING[name]}})
    assert str(caught.value) == (
        f"partition_sbatch.debug.{name}: slurm.adapter: {adapter} does not support it; cli does"
    )  # fmt: skip


def test_options_that_sbatch_refuses_together(tmp_path: Path) -> None:
    with pytest.raises(
        PolicyError, match=r"^sbatch\.hint: sbatch does not accept hint with partition_sbatch\.debug\.thr"
    ):
        policy(tmp_path, sbatch={"hint": "multithread"}, partition_sbatch={"debug": {"threads_per_core": 1}})
    with pytest.raises(PolicyError, match=r"^partition_sbatch\.gpu: 'gpu' is not among the site's partitions"):
        policy(tmp_path, partition_sbatch={"gpu": {}})


CARRIED = Options(
    constraint="gpu", reservation="r", exclusive="yes", wckey="w", licenses="l", nice=3, threads_per_core=1,
    memory="per-cpu", gpus="per-task",
)  # fmt: skip


def test_what_the_other_adapters_send(tmp_path: Path) -> None:
    wanted = any_submission(
        tmp_path, partition="", steps=2, memory_mib=801, options=CARRIED,
        gres=(Gres("gpu", "a100", 4), Gres("nic", "", 1)),
    )  # fmt: skip
    alike = {"constraints": "gpu", "reservation": "r", "wckey": "w", "licenses": "l", "nice": 3, "threads_per_core": 1}
    old = rest_format.submission(38, wanted, "", {})["job"]
    assert alike.items() <= old.items() and "partition" not in old and "memory_per_node" not in old
    assert (old["exclusive"], old["memory_per_cpu"], old["gpus_per_task"], old["gres"]) == (
        "exclusive",
        101,
        "a100:2",
        "nic:1",
    )
    new = rest_format.submission(42, wanted, "", {})["job"]
    assert alike.items() <= new.items() and "partition" not in new and "memory_per_node" not in new
    assert (new["shared"], new["memory_per_cpu"]["number"]) == (["none"], 101)
    assert (new["tres_per_task"], new["tres_per_node"]) == ("gres/gpu:a100:2", "gres/nic:1")
    own = description(wanted, {})
    assert "partitions" not in own and "memory_per_node" not in own
    assert (own["constraints"], own["reservations"], own["resource_sharing"], own["nice"]) == ("gpu", "r", "no", 3)
    assert (own["memory_per_cpu"], own["gpus_per_task"], own["gres_per_node"]) == ("101M", "a100:2", "nic:1")
