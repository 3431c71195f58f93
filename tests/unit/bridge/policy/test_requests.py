"""Malformed requests are refused, and the message names the field."""

import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus_bridge.batch.batch_script import render
from isthmus_bridge.files.run_directory import RunDirectory
from isthmus_bridge.policy.authorization import Denial, decide
from isthmus_bridge.pools.spec_checks import RequestError, check_key, check_spec, digest
from isthmus_bridge.pools.submitter import submission
from isthmus_bridge.slurm.cli import arguments
from isthmus_contracts.pb import bridge_pb2 as pb
from tests.support.fake_slurm import KEY, PEM, policy, spec


def test_a_good_request_passes() -> None:
    check_key(KEY)
    check_spec(spec(env={"A": "two\nlines"}, command=["python3", "-c", "x = 1\nprint(x)"], data_ref="cohort-a"))


@pytest.mark.parametrize(
    "key", ["", "short", "A" * 32, "a" * 64, "../etc/passwd", "abcdefgh\n", "-abcdefgh", "a/bcdefgh"]
)
def test_keys(key: str) -> None:
    with pytest.raises(RequestError, match=r"^key: "):
        check_key(key)


def federation(**changes: object) -> pb.Federation:
    changed = pb.Federation()
    changed.CopyFrom(spec().federation)
    changed.MergeFrom(pb.Federation(**changes))  # type: ignore[arg-type]
    return changed


BAD: list[tuple[str, dict[str, object]]] = [
    ("spec.job_uid", {"job_uid": "../x"}),
    ("spec.job_uid", {"job_uid": ""}),
    ("spec.namespace", {"namespace": "a\nb"}),
    ("spec.job", {"job": "$(reboot)"}),
    ("spec.pool", {"pool": "a b"}),
    ("spec.attempt", {"attempt": 3_000_000}),
    ("spec.replicas", {"replicas": 0}),
    ("spec.first_client", {"first_client": 4}),
    ("spec.partition", {"partition": "--wrap=reboot"}),
    ("spec.account", {"account": "a,b"}),
    ("spec.qos", {"qos": "x\x00"}),
    ("spec.time_limit_seconds", {"time_limit_seconds": 0}),
    ("spec.cpus_per_task", {"cpus_per_task": 0}),
    ("spec.memory_mib", {"memory_mib": 0}),  # Slurm's name for all of a node's memory
    ("spec.gres[0].name", {"gres": [pb.GenericResource(name="gpu:2,x", count=1)]}),
    ("spec.gres[0].count", {"gres": [pb.GenericResource(name="gpu")]}),
    ("spec.environment", {"environment": ""}),
    ("spec.data_ref", {"data_ref": "/etc"}),
    ("spec.image", {"image": "-v"}),
    ("spec.image", {"image": "registry.example/team/../other"}),
    ("spec.command", {"command": []}),
    ("spec.command[0]", {"command": [""]}),
    ("spec.command[1]", {"command": ["python3", "a\0b"]}),
    ("spec.command[1]", {"command": ["python3", "a" * 4097]}),
    ("spec.command", {"command": ["x"] * 129}),
    ("spec", {"command": ["x", *["ä" * 4096] * 40]}),
    ("spec.env", {"env": {"A-B": "1"}}),
    ("spec.env", {"env": {"A\n": "1"}}),
    ("spec.env[ISTHMUS_X]", {"env": {"ISTHMUS_X": "1"}}),
    ("spec.env[A]", {"env": {"A": "a\0b"}}),
    ("spec.federation.endpoint", {"federation": federation(endpoint="host")}),
    ("spec.federation.endpoint", {"federation": federation(endpoint="host:99999")}),
    ("spec.federation.server_name", {"federation": federation(server_name="a b")}),
    ("spec.federation.private_key", {"federation": federation(private_key=b"hello")}),
    ("spec.federation.certificate", {"federation": federation(certificate=PEM + b"x" * 70_000)}),
    ("spec.privacy.noise_multiplier", {"privacy": pb.Privacy(noise_multiplier=float("nan"))}),
    ("spec.privacy.min_parties", {"privacy": pb.Privacy(min_parties=1001)}),
    ("spec.privacy.min_clients", {"privacy": pb.Privacy(min_clients=1_000_001)}),
    ("spec.privacy.max_epsilon", {"privacy": pb.Privacy(max_epsilon=-1)}),
]


@pytest.mark.parametrize(("field", "changes"), BAD, ids=[f"{number}-{field}" for number, (field, _) in enumerate(BAD)])
def test_malformed(field: str, changes: dict[str, object]) -> None:
    with pytest.raises(RequestError) as caught:
        check_spec(spec(**changes))
    message = str(caught.value)
    assert message.startswith(f"{field}: "), message
    assert len(message) < 300 and "\n" not in message


def test_the_digest_leaves_credentials_out_and_nothing_else() -> None:
    assert digest(spec(federation=federation(private_key=PEM + PEM))) == digest(spec())
    assert digest(spec(federation=federation(endpoint="other:1"))) != digest(spec())
    assert digest(spec(env={"A": "1", "B": "2"})) == digest(spec(env={"B": "2", "A": "1"}))
    assert digest(spec(privacy=pb.Privacy())) == digest(spec())
    assert len({digest(spec(privacy=pb.Privacy(secure_aggregation=it))) for it in (True, False)}) == 2


HOSTILE = st.one_of(
    st.sampled_from(["$(touch /tmp/owned)", "`id`", "'; exit 9 #", '"', "a\nb", "a\0b", "%x", "%j", "--wrap=reboot",
                     "-p", "a b", "../x", "/etc/passwd", "a,b", "a%1", "é", "\u202e", "a\tb", "~", "*", "a:b=c", ";",
                     "|", "&"]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
)  # fmt: skip
TEXT_FIELDS = ["key", "job_uid", "namespace", "job", "pool", "partition", "account", "qos", "environment", "data_ref",
               "image", "gres.name", "gres.type", "endpoint", "server_name"]  # fmt: skip
# Values that are allowed in a field that reaches Slurm, a path or the script without quotes.
PLAIN = re.compile(r"[A-Za-z0-9_.:@/\[\]+-]+")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(TEXT_FIELDS), value=HOSTILE)
def test_a_hostile_string_in_any_field_is_refused_by_name_or_stays_a_plain_word(
    tmp_path: Path, field: str, value: str
) -> None:
    key, wanted = _with(field, value)
    try:
        check_key(key)
        check_spec(wanted)
    except RequestError as error:
        assert str(error).isprintable(), "one line, and nothing in it that acts on a terminal"
        assert field.rpartition(".")[2] in str(error)
        return
    assert PLAIN.fullmatch(value) and not value.startswith("-")
    # The value is well-formed. If the policy allows it too, each of sbatch's arguments is still one option or the
    # script. The environment and the data set are names that the policy maps to values; the names themselves never
    # reach sbatch.
    changes = (
        {f"{field}s": [value]} if field in ("partition", "account") else {"qos": [value]} if field == "qos" else {}
    )
    resources = {"replicas": 9, "gres": {gres.name: 9 for gres in wanted.gres}}
    grant = decide(site := policy(tmp_path, limits=resources, **changes), site.identities[0], wanted)
    if isinstance(grant, Denial):
        assert str(grant).isprintable()
        return
    run = RunDirectory(site.run_dir, key)
    options = arguments(submission(site, key, site.identities[0].uri, wanted, grant, run))
    assert all(re.match(r"--[a-z-]+(=|$)", option) for option in options[:-1])
    assert options[-1] == str(run.script)
    text = render(key, wanted, grant, run.path, run.tls)
    checked = subprocess.run(["/bin/bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def _with(field: str, value: str) -> tuple[str, pb.PoolSpec]:
    wanted = spec(gres=[pb.GenericResource(name="gpu", type="a100", count=1)])
    if field == "key":
        return value, wanted
    target = {"gres": wanted.gres[0], "endpoint": wanted.federation, "server_name": wanted.federation}
    setattr(target.get(field.partition(".")[0], wanted), field.rpartition(".")[2], value)
    return KEY, wanted
