"""The policy of one caller and of all callers together, drain, and the end of all pools of a caller."""

import threading
from pathlib import Path

import pytest

from isthmus_bridge.admin import orders
from isthmus_bridge.cli import main
from isthmus_bridge.policy.authorization import Grant, decide, too_many
from isthmus_bridge.policy.policy import PolicyError, parse
from isthmus_bridge.pools.pools import Denied
from isthmus_contracts.pb import bridge_pb2 as pb
from tests.support.fake_slurm import KEY, OPERATOR, World, policy, spec
from tests.unit.bridge.admin.test_command_line import policy_file

from .test_sites import OTHER, command_line, gpus


def test_rules_of_one_caller(tmp_path: Path) -> None:
    site = policy(
        tmp_path,
        qos=["high"],
        data_sets={"a": "/a", "b": "/b"},
        environments={"plain": {"prefix": ["env"]}, "other": {"venv": "/v"}},
        limits={"replicas": 4, "cpus_per_task": 8},
        identities=[
            {"uri": OPERATOR},
            {"uri": OTHER, "qos": [], "data_sets": ["b"], "environments": ["other"], "code_files": False,
             "limits": {"cpus_per_task": 2}},
        ],
    )  # fmt: skip
    free, bound = site.identities
    wanted: dict[str, object] = {
        "environment": "other",
        "qos": "high",
        "data_ref": "a",
        "code": {"x": b""},
        "cpus_per_task": 8,
    }
    assert isinstance(decide(site, free, spec(**wanted)), Grant)
    denials: list[tuple[dict[str, object], str]] = [
        ({"environment": "plain"}, f"policy environments: 'plain' is not allowed for {OTHER}; allowed: other"),
        ({"qos": "high"}, f"policy qos: 'high' is not allowed for {OTHER}; allowed: none"),
        ({"data_ref": "a"}, f"policy data_sets: 'a' is not allowed for {OTHER}; allowed: b"),
        (
            {"code": {"x": b""}},
            f"policy code_files: 'x' is not allowed for {OTHER}; this site takes no files (task.code)",
        ),
        ({"cpus_per_task": 3}, "policy limits.cpus_per_task: 3 is more than the 2 that the site allows"),
        ({"replicas": 5, "total_clients": 9}, "policy limits.replicas: 5 is more than the 4 that the site allows"),
    ]
    for changes, message in denials:
        asked: dict[str, object] = {"environment": "other", **changes}
        assert str(decide(site, bound, spec(**asked))).startswith(message)
    assert isinstance(decide(site, bound, spec(environment="other", data_ref="b", cpus_per_task=2)), Grant)
    for field in ("qos", "data_sets", "environments"):
        with pytest.raises(PolicyError, match=rf"^identities\[0\]\.{field}: 'nope' is not among the site's {field}"):
            policy(tmp_path, identities=[{"uri": OPERATOR, field: ["nope"]}])


def test_a_callers_own_limits_survive_the_command_line(tmp_path: Path) -> None:
    """`serve --listen` parses the policy again as a whole; unset fields must stay unset."""
    site = policy(tmp_path, limits={"replicas": 4}, identities=[{"uri": OPERATOR, "limits": {"pools": 1}}])
    again = parse({**site.model_dump(mode="json", exclude_unset=True), "listen": "127.0.0.1:1"})
    assert again.identities[0].limits is not None
    assert str(decide(again, again.identities[0], spec(replicas=5, total_clients=9))).startswith(
        "policy limits.replicas"
    )


def test_accounts_with_an_at_sign(tmp_path: Path) -> None:
    site = policy(tmp_path, accounts=["abc@v100", "a/b:c"])
    assert "--account=abc@v100" in command_line(site)
    assert "--account=a/b:c" in command_line(site, account="a/b:c")
    for hostile in ("-x", "a b", "a,b", "a\nb", "a%j", "$(id)", "@a"):
        with pytest.raises(PolicyError, match=r"^accounts\[0\]"):
            policy(tmp_path, accounts=[hostile])


TYPED: list[tuple[dict[str, int], list[pb.GenericResource], str]] = [
    ({"gpu": 4}, gpus(4, "a100"), ""),
    ({"gpu": 4, "gpu:a100": 2}, gpus(2, "a100"), ""),
    ({"gpu": 4, "gpu:a100": 2}, gpus(4, "v100"), ""),
    ({"gpu": 4, "gpu:a100": 2}, gpus(3, "a100"), "gpu:a100:3 is more than the 2 that the site allows"),
    (
        {"gpu": 4, "gpu:a100": 2},
        gpus(3),
        "gpu:a100:3 is more than the 2 that the site allows; a request without a type",
    ),
    ({"gpu": 4, "gpu:a100": 2}, gpus(5, "v100"), "gpu:5 is more than the 4 that the site allows"),
    ({"gpu:a100": 2}, gpus(1), "'gpu' needs a type at this site; allowed: gpu:a100"),
    ({"gpu:a100": 2}, gpus(1, "v100"), "'gpu:v100' is not allowed for isthmus://operator/prod; allowed: gpu:a100"),
]


@pytest.mark.parametrize(("caps", "wanted", "message"), TYPED)
def test_caps_by_type(tmp_path: Path, caps: dict[str, int], wanted: list[pb.GenericResource], message: str) -> None:
    site = policy(tmp_path, limits={"gres": caps})
    answer = decide(site, site.identities[0], spec(gres=wanted))
    if message:
        assert str(answer).startswith(f"policy limits.gres: {message}")
    else:
        assert isinstance(answer, Grant)


def test_totals_by_type(tmp_path: Path) -> None:
    site = policy(tmp_path, limits={"gres": {"gpu": 9}, "total_gres": {"gpu:a100": 4}})
    live = [spec(gres=gpus(1, "a100"))]
    for wanted, more in ((gpus(1, "a100"), 3), (gpus(1), 3), (gpus(2, "v100"), 0)):
        denial = too_many(site, site.identities[0], spec(gres=wanted), live, 0)
        assert (str(denial) if denial else "") == (
            f"policy limits.total_gres.gpu:a100: {more} more than the 3 that {OPERATOR} has; at most 4" if more else ""
        )


def test_caps_over_all_callers(tmp_path: Path) -> None:
    world = World(tmp_path, all_callers={"total_tasks": 5}, limits={"gres": {"gpu": 1}})
    world.ensure()
    other = world.policy.identities[1]
    with pytest.raises(Denied) as caught:
        world.pools.ensure(other, "f" * 32, spec())
    assert caught.value.transient
    assert str(caught.value) == (
        "policy all_callers.total_tasks: 3 more than the 3 that all callers together have; at most 5"
    )  # fmt: skip
    world.pools.ensure(other, "e" * 32, spec(replicas=2))
    site = policy(tmp_path, all_callers={"pools": 2})
    assert str(too_many(site, site.identities[0], spec(), [], 0, [spec(), spec()])) == (
        "policy all_callers.pools: all callers have 2 live pools; at most 2"
    )


# -- drain, and the end of all pools of a caller


def test_a_drained_site_takes_nothing_new_and_lets_the_others_end(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.slurm.script = ["ok"]
    world.ensure()
    world.array().states[:] = ["RUNNING"] * 3
    waiting = "a" * 32
    world.slurm.script = ["full"]
    world.ensure(waiting)
    before = world.slurm.submissions
    world.current_policy.replace(policy(tmp_path, drain="maintenance on 3 June"))
    with pytest.raises(Denied) as caught:
        world.ensure("b" * 32)
    assert caught.value.transient
    words = "policy drain: this site takes no new jobs for now: maintenance on 3 June"
    assert str(caught.value) == words
    # A repeated request for an existing pool is answered as before.
    assert world.ensure().key == KEY
    world.tick(31.0, times=3)
    assert (world.phase(waiting), world.pool(waiting).message) == ("SUBMITTING", words)
    assert (world.phase(), world.slurm.submissions) == ("RUNNING", before)
    world.array().states[:] = ["COMPLETED"] * 3
    world.tick()
    assert world.phase() == "SUCCEEDED"
    world.slurm.script = ["ok"]
    world.current_policy.replace(policy(tmp_path))
    world.tick(31.0, times=2)
    assert world.phase(waiting) == "PENDING"


def test_one_caller_can_be_drained(tmp_path: Path) -> None:
    identities = [{"uri": OPERATOR}, {"uri": OTHER, "drain": "its project has ended"}]
    world = World(tmp_path, identities=identities)
    world.ensure()
    with pytest.raises(Denied) as caught:
        world.pools.ensure(world.policy.identities[1], "f" * 32, spec())
    assert str(caught.value) == (
        f"policy identities.drain: this site takes no new jobs of {OTHER} for now: its project has ended"
    )


def test_all_pools_of_a_caller_end(tmp_path: Path) -> None:
    world = World(tmp_path)
    other, kept = world.policy.identities[1], "f" * 32
    world.ensure()
    world.ensure("a" * 32)
    world.pools.ensure(other, kept, spec())
    assert sorted(world.pools.end_all(OPERATOR, "leak\nof a key")) == sorted([KEY, "a" * 32])
    assert world.pools.end_all(OPERATOR, "again") == []
    for array in world.slurm.arrays:
        if not array.name.endswith(kept):
            assert world.pool(array.name.removeprefix("isthmus-")).message == "ended by the site's admin: leak of a key"
    world.tick(11.0, times=3)
    assert (world.phase(), world.phase("a" * 32), world.phase(kept)) == ("CANCELLED", "CANCELLED", "PENDING")
    assert world.pool().message == "ended by the site's admin: leak of a key"


def test_the_verb_reaches_the_bridge_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = policy_file(tmp_path, journal=str(tmp_path / "journal.db"))
    journal, asked, over = tmp_path / "journal.db", list[tuple[str, str]](), threading.Event()

    def end(caller: str, reason: str) -> list[str]:
        asked.append((caller, reason))
        return ["k1", "k2"]

    def bridge() -> None:
        while not over.wait(0.05):
            orders.execute(journal, end)

    thread = threading.Thread(target=bridge, daemon=True)
    thread.start()
    try:
        assert main(["end", "--policy", str(path), "--identity", OPERATOR, "--reason", "gone"]) == 0
    finally:
        over.set()
        thread.join()
    assert capsys.readouterr().out == f"k1\nk2\n2 pools of {OPERATOR} are being ended\n"
    assert asked == [(OPERATOR, "gone")] and list((tmp_path / "orders").iterdir()) == []


def test_an_order_that_no_bridge_answers_is_withdrawn(tmp_path: Path) -> None:
    with pytest.raises(orders.OrderError, match="is not running, or hangs; nothing was ended"):
        orders.end_all(tmp_path / "journal.db", OPERATOR, "gone", 0.2)
    assert list((tmp_path / "orders").iterdir()) == []
    # Files that are not orders are ignored; malformed orders are answered and removed.
    (tmp_path / "orders" / "x.order").write_text("[]")
    (tmp_path / "orders" / "note.txt").write_text("")
    orders.execute(tmp_path / "journal.db", lambda caller, reason: [])
    assert sorted(each.name for each in (tmp_path / "orders").iterdir()) == ["note.txt", "x.answer"]
