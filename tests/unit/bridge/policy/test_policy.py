"""The policy file: faults in one line each, and every rule with its denial."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from isthmus_bridge.policy.authorization import Denial, Grant, decide, identify, too_many
from isthmus_bridge.policy.current import CurrentPolicy
from isthmus_bridge.policy.parts import AllCallers, Limits, SbatchOptions
from isthmus_bridge.policy.policy import (
    Environment,
    GatewaySettings,
    Identity,
    Policy,
    PolicyError,
    SlurmSettings,
    UserSettings,
    load,
    parse,
    schema,
)
from isthmus_bridge.policy.privacy import DifferentialPrivacyRules, PrivacyRules, SecureAggregationRules
from isthmus_contracts.pb import bridge_pb2 as pb
from tests.support.fake_slurm import spec

EXAMPLES = Path(__file__).parents[4] / "bridge" / "examples"
GOOD: dict[str, object] = {
    "site": "lumi",
    "run_dir": "/shared/isthmus",
    "tls_dir": "/etc/isthmus/tls",
    "identities": [
        {"uri": "isthmus://operator/prod", "accounts": ["proj_1"], "namespaces": ["team-*", "default"]},
        {"uri": "isthmus://operator/test", "partitions": ["debug"]},
    ],
    "partitions": ["main", "debug"],
    "accounts": ["proj_1", "proj_2"],
    "qos": ["normal"],
    "environments": {
        "venv": {"venv": "/opt/isthmus"},
        "own": {"prefix": ["ch-run", "{image}", "--"], "images": ["registry.example/team/*"]},
    },
    "data_sets": {"cohort-a": "/data/a"},
    "limits": {"replicas": 8, "gres": {"gpu": 2}, "cpus_per_task": 16, "memory_mib": 1000, "time_limit_seconds": 7200},
}


USERS = {"run_dir": "/scratch/{user}/isthmus"}
REST = {"adapter": "rest", "rest": {"url": "unix:/s", "token_file": "/t"}}


def with_(**changes: object) -> dict[str, object]:
    return {**GOOD, **changes}


BAD: list[tuple[object, str]] = [
    ([], "the policy must be a mapping"),
    (with_(site="two words"), "site: "),
    (with_(colour="red"), "colour: unknown field"),
    ({k: v for k, v in GOOD.items() if k != "run_dir"}, "run_dir: is missing"),
    (with_(run_dir="relative"), "run_dir: 'relative' must be an absolute path"),
    (with_(run_dir="/a/%j"), "run_dir: "),
    (with_(listen="nowhere"), "listen: 'nowhere' is not HOST:PORT"),
    (with_(partitions=["--help"]), "partitions[0]: "),
    (with_(identities=[{"uri": "x:y", "accounts": ["nobody"]}]), "identities[0].accounts: 'nobody' is not among"),
    (with_(identities=[{"uri": "x:y"}, {"uri": "x:y"}]), "identities[1].uri: 'x:y' is listed twice"),
    (with_(environments={"e": {}}), "environments.e: needs exactly one of"),
    (with_(identities=[{"uri": "x:y", "user": "alice"}]), "identities[0].user: 'alice' needs the settings users"),
    (with_(identities=[{"uri": "x:y", "user": "root"}], users=USERS), "identities[0].user: 'root' is refused"),
    (with_(identities=[{"uri": "x:y", "user": "0"}], users=USERS), "identities[0].user: String should match pattern"),
    (with_(identities=[{"uri": "x:y", "user": "ALL"}], users=USERS), "identities[0].user: String should match"),
    (
        with_(identities=[{"uri": "x:y", "user": "alice"}], users=USERS, slurm={**REST}),
        "identities[0].user: 'alice' needs slurm.adapter: cli; with rest jobs belong to the bridge's user",
    ),
    (
        with_(identities=[{"uri": "x:y", "user": "alice"}], users=USERS, slurm={"adapter": "pyslurm"}),
        "identities[0].user: 'alice' needs slurm.adapter: cli; with pyslurm jobs",
    ),
    (
        with_(identities=[{"uri": "x:y", "user": "alice"}], users=USERS, slurm={"conf": "/etc/a,b"}),
        "slurm.conf: '/etc/a,b' cannot be used in sudoers, which identities[0].user: 'alice' needs",
    ),
    (with_(users={"run_dir": "/scratch/isthmus"}), "users.run_dir: '/scratch/isthmus' must be an absolute path with"),
    (with_(users={"run_dir": "/scratch/x{user}"}), "users.run_dir: "),
    (with_(users={"run_dir": "/scratch/{user}/a b"}), "users.run_dir: "),
    (with_(gateways=[{"address": "h:1", "proxy": "socks5://h:1"}]), "gateways[0].proxy: is not http://HOST:PORT"),
    (with_(slurm={"adapter": "drmaa"}), "slurm.adapter: "),
    (with_(slurm={"adapter": "rest"}), "slurm: adapter: rest needs the settings rest"),
    (
        with_(slurm={"rest": {"url": "http://h:1", "token_file": "/t"}}),
        "slurm.rest.url: 'http://h:1' would send tokens",
    ),
    (with_(slurm={"rest": {"url": "unix:/s"}}), "slurm.rest: needs exactly one of token_file and token_command"),
    (with_(environments={"e": {"venv": "/v", "apptainer": "/i"}}), "environments.e: needs exactly one of"),
    (with_(environments={"e": {"prefix": ["run", "{home}"]}}), "environments.e: prefix: unknown placeholder {home}"),
    (with_(environments={"e": {"prefix": ["{image}"], "images": ["*"]}}), "environments.e: prefix: the program"),
    (with_(environments={"e": {"prefix": ["run", "{image}"]}}), "environments.e: a prefix with {image} needs images"),
    (with_(environments={"e": {"venv": "/v", "setup": ["a\nb"]}}), "environments.e.setup[0]: must not be empty or"),
    (with_(environments={"e": {"venv": "/v", "env": {"ISTHMUS_X": "1"}}}), "environments.e: env.ISTHMUS_X: "),
    (with_(environments={"e": {"venv": "/v", "options": ["--nv"]}}), "environments.e: options needs apptainer"),
    (with_(limits={"replicas": 0}), "limits.replicas: "),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_faults(content: object, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(content)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML"), (None, "No such file")])
def test_files(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "policy.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PolicyError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return parse(GOOD)


def gres(name: str, count: int) -> pb.GenericResource:
    return pb.GenericResource(name=name, count=count)


# One entry for each rule: the request, and the exact denial.
DENIALS: list[tuple[dict[str, object], str]] = [
    (
        {"namespace": "sandbox"},
        "policy namespaces: 'sandbox' is not allowed for isthmus://operator/prod; allowed: team-*, default",
    ),
    ({"partition": "gpu"}, "policy partitions: 'gpu' is not allowed for isthmus://operator/prod; allowed: main, debug"),
    ({"account": "proj_2"}, "policy accounts: 'proj_2' is not allowed for isthmus://operator/prod; allowed: proj_1"),
    ({"qos": "high"}, "policy qos: 'high' is not allowed for isthmus://operator/prod; allowed: normal"),
    (
        {"environment": "conda"},
        "policy environments: 'conda' is not allowed for isthmus://operator/prod; allowed: venv, own",
    ),
    (
        {"environment": "own", "image": "registry.example/other/x:1"},
        "policy environments.own.images: 'registry.example/other/x:1' is not allowed for isthmus://operator/prod;"
        " allowed: registry.example/team/*",
    ),
    (
        {"data_ref": "cohort-b"},
        "policy data_sets: 'cohort-b' is not allowed for isthmus://operator/prod; allowed: cohort-a",
    ),
    (
        {"env": {"LD_PRELOAD": "/x.so"}},
        "policy env_denied: 'LD_PRELOAD' is not allowed for isthmus://operator/prod; denied: LD_*",
    ),
    ({"replicas": 9, "total_clients": 20}, "policy limits.replicas: 9 is more than the 8 that the site allows"),
    ({"cpus_per_task": 17}, "policy limits.cpus_per_task: 17 is more than the 16 that the site allows"),
    ({"memory_mib": 1001}, "policy limits.memory_mib: 1001 is more than the 1000 that the site allows"),
    ({"time_limit_seconds": 7201}, "policy limits.time_limit_seconds: 7201 is more than the 7200 that the site allows"),
    (
        {"gres": [gres("fpga", 1)]},
        "policy limits.gres: 'fpga' is not allowed for isthmus://operator/prod; allowed: gpu",
    ),
    ({"gres": [gres("gpu", 2), gres("gpu", 1)]}, "policy limits.gres: gpu:3 is more than the 2 that the site allows"),
]


@pytest.mark.parametrize(("changes", "message"), DENIALS, ids=[message.split(":")[0] for _, message in DENIALS])
def test_denials(policy: Policy, changes: dict[str, object], message: str) -> None:
    denial = decide(policy, policy.identities[0], spec(**{"environment": "venv", **changes}))
    assert isinstance(denial, Denial)
    assert str(denial) == message


def test_an_environment_may_deny_further_variables() -> None:
    wanted = spec(environment="e", env={"PATH": "/x", "PYTHONHASHSEED": "0"})
    site = parse(with_(environments={"e": {"prefix": ["run"]}}))
    assert isinstance(decide(site, site.identities[0], wanted), Grant)
    site = parse(with_(environments={"e": {"prefix": ["run"], "env_denied": ["PYTHONHASH*"]}}))
    assert "denied: PYTHONHASH*" in str(decide(site, site.identities[0], wanted))


def test_a_time_limit_is_granted_in_slurms_whole_minutes() -> None:
    """61 s would become two minutes, above a cap of 90 s."""
    site = parse(with_(limits={"time_limit_seconds": 90}))
    assert str(decide(site, site.identities[0], spec(environment="venv", time_limit_seconds=61))) == (
        "policy limits.time_limit_seconds: 61 is more than the 60 that the site allows (90 in whole minutes)"
    )
    assert isinstance(decide(site, site.identities[0], spec(environment="venv", time_limit_seconds=60)), Grant)


def test_users_files_are_accepted_if_the_site_accepts_them(policy: Policy) -> None:
    wanted = spec(environment="venv", code={"train.py": b"1", "data.py": b"2"})
    assert isinstance(decide(policy, policy.identities[0], wanted), Grant)
    closed = parse(with_(code_files=False))
    assert str(decide(closed, closed.identities[0], wanted)) == (
        "policy code_files: 'data.py' is not allowed for isthmus://operator/prod; this site takes no files (task.code)"
    )
    assert isinstance(decide(closed, closed.identities[0], spec(environment="venv")), Grant)


TOTALS = {"total_tasks": 8, "total_cpus": 20, "total_memory_mib": 900, "total_gres": {"gpu": 4}, "pools_per_day": 9}
# The caller has one pool of 3 tasks, each of 2 CPUs, 100 MiB and 1 GPU, and has requested 4 pools within a day.
TOO_MANY: list[tuple[dict[str, object], dict[str, object], str]] = [
    ({"pools": 1}, {}, "policy limits.pools: isthmus://operator/prod has 1 live pools; at most 1"),
    (
        {"pools_per_day": 4},
        {},
        "policy limits.pools_per_day: isthmus://operator/prod has requested 4 pools within a day; at most 4",
    ),
    (
        {},
        {"replicas": 6},
        "policy limits.total_tasks: 6 more than the 3 that isthmus://operator/prod has; at most 8",
    ),
    (
        {},
        {"cpus_per_task": 5},
        "policy limits.total_cpus: 15 more than the 6 that isthmus://operator/prod has; at most 20",
    ),
    (
        {},
        {"memory_mib": 201},
        "policy limits.total_memory_mib: 603 more than the 300 that isthmus://operator/prod has; at most 900",
    ),
    (
        {},
        {"gres": [gres("gpu", 1)]},
        "policy limits.total_gres.gpu: 3 more than the 3 that isthmus://operator/prod has; at most 4",
    ),
]


@pytest.mark.parametrize(("limits", "wanted", "message"), TOO_MANY, ids=[m.split(":")[0] for _, _, m in TOO_MANY])
def test_denials_of_one_more_pool(limits: dict[str, object], wanted: dict[str, object], message: str) -> None:
    site = parse(with_(limits={**TOTALS, **limits}))
    live = [spec(cpus_per_task=2, gres=[gres("gpu", 1)])]
    assert str(too_many(site, site.identities[0], spec(**{"replicas": 3, **wanted}), live, 4)) == message


def test_one_more_pool_within_the_totals() -> None:
    site = parse(with_(limits=TOTALS))
    assert too_many(site, site.identities[0], spec(), [spec()], 4) is None
    # Lowering a limit ends no pool, and pools that do not use the resource are still accepted.
    assert too_many(site, site.identities[0], spec(), [spec(gres=[gres("gpu", 2)])], 4) is None


def test_a_policy_can_be_replaced_but_not_what_the_bridge_was_built_with(policy: Policy) -> None:
    current = CurrentPolicy(policy)
    assert current.replace(parse(with_(partitions=["main", "debug", "gpu"]))) == ["partitions"]
    assert current.policy.partitions == ["main", "debug", "gpu"]
    with pytest.raises(PolicyError, match=r"^listen, slurm: changes only with a restart"):
        current.replace(parse(with_(listen="127.0.0.1:1", slurm={"poll_seconds": 5}, qos=[])))
    assert current.policy.qos == ["normal"], "half of it was taken"


def test_the_schema_is_the_generated_one_and_says_what_it_can() -> None:
    shipped = EXAMPLES / "policy.schema.json"
    assert shipped.read_text() == schema(), "run `make generate`"
    validator = jsonschema.Draft202012Validator(json.loads(schema()))
    example = yaml.safe_load((EXAMPLES / "policy.yaml").read_text())
    assert not list(validator.iter_errors(example))
    assert [error.message for error in validator.iter_errors({**example, "colour": "red"})]
    assert [error.message for error in validator.iter_errors({**example, "limits": {"replicas": 0}})]


def test_grants_fill_in_defaults(policy: Policy) -> None:
    grant = decide(policy, policy.identities[0], spec(environment="venv", data_ref="cohort-a"))
    assert isinstance(grant, Grant)
    assert (grant.partition, grant.account, grant.data, grant.image) == ("main", "proj_1", "/data/a", "")
    other = decide(policy, policy.identities[1], spec(environment="venv"))
    assert isinstance(other, Grant)
    assert (other.partition, other.account) == ("debug", "proj_1")


def test_callers(policy: Policy) -> None:
    assert identify(policy, ["spiffe://x", "isthmus://operator/test"]) == policy.identities[1]
    assert str(identify(policy, ["isthmus://job/u/pool/p"])) == (
        "policy identities: 'isthmus://job/u/pool/p' is not known at this site"
    )
    assert "a certificate without a URI" in str(identify(policy, []))


def test_the_commented_example_is_valid_and_shows_every_field() -> None:
    path = EXAMPLES / "policy.yaml"
    example = load(path)
    text = path.read_text()
    models: list[type[BaseModel]] = [
        Policy,
        Identity,
        Environment,
        Limits,
        SlurmSettings,
        UserSettings,
        GatewaySettings,
        SbatchOptions,
        AllCallers,
        PrivacyRules,
        SecureAggregationRules,
        DifferentialPrivacyRules,
    ]
    for model in models:
        for field in model.model_fields:
            assert f"{field}:" in text, field
    assert example.env_denied == Policy.model_fields["env_denied"].default
