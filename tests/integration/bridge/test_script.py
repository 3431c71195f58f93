"""The batch script, rendered, parsed by bash, and run: hostile values remain values."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from isthmus_bridge.batch.batch_script import _only_safe, comment, quote, render, render_job
from isthmus_bridge.files.run_directory import AUDIT_FOLDER, RunDirectory, TaskMarker
from isthmus_bridge.policy.authorization import Grant, decide
from isthmus_bridge.policy.policy import Policy
from isthmus_bridge.slurm.model import Gres
from isthmus_contracts.pb import bridge_pb2 as pb
from tests.support.fake_slurm import KEY, policy, spec

# Writes its arguments, its environment and its working directory.
PROBE = (
    "import json, os, sys; json.dump({'argv': sys.argv[1:], 'env': dict(os.environ), 'cwd': os.getcwd()},"
    " open(os.path.join(os.environ['ISTHMUS_TLS_DIR'], 'seen'), 'w'))"
)
PYTHON = sys.executable

# Everything that protobuf can carry except NUL, which is refused earlier.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
NASTY = st.sampled_from(
    ["$(touch /tmp/owned)", "`id`", "'; exit 9 #", '"$HOME"', "a\nb", "%x%j%a", "-rf", "--", "\\", "!!", "${x:=1}", "*",
     "a[$(touch /tmp/owned)]", "~", "\t", "é€😀", "\x1b[31m", "{{ 7*7 }}", "{% raw %}", "{tls_dir}", "$'\\x41'",
     "\r", ""]
)  # fmt: skip
VALUE = st.one_of(NASTY, TEXT, st.tuples(NASTY, TEXT).map("".join))
# Names that the script uses itself, or that bash interprets.
NAMES = st.one_of(
    st.sampled_from(["run", "index", "work_dir", "code", "stage", "child", "signalled", "launcher", "note", "init",
                     "PWD", "_", "OPTIND", "HOME"]),
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True),
)  # fmt: skip
# The shell sets or protects these; a job that sets them gets the shell's values.
BASH_OWN = {"_", "UID", "EUID", "PPID", "BASHOPTS", "SHELLOPTS", "PATH", "OPTIND"}

SITE_ENVIRONMENTS: dict[str, dict[str, object]] = {
    "plain": {"prefix": ["env"]},
    "nowhere": {"prefix": ["no-such-launcher", "--"]},
    "venv": {"venv": "/opt/a venv"},
    "modules": {"modules": ["cray-python/3.11", "it's"], "venv": "/opt/v"},
    "apptainer": {"apptainer": "/images/isthmus 1.sif", "options": ["--nv"]},
    "container": {
        "prefix": [
            "ch-run", "--bind={tls_dir}:/mnt/0", "--bind={work_dir}:/mnt/1", "--bind={data}:/mnt/2", "{image}", "--",
        ],
        "images": ["*"],
        "inside": {"tls_dir": "/mnt/0", "work_dir": "/mnt/1", "data": "/mnt/2"},
    },
    "set-up": {"prefix": ["env"], "setup": ["export SITE='a b'", "false", "touch never"], "env": {"N": 1.5}},
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    root = tmp_path_factory.mktemp("it's $HOME & co")
    # No variable is denied, because this tests the script and not the policy.
    return policy(root, environments=SITE_ENVIRONMENTS, data_sets={"cohort-a": "/data/co hort"}, env_denied=[])


def rendered(site: Policy, request: pb.PoolSpec) -> str:
    grant = decide(site, site.identities[0], request)
    assert isinstance(grant, Grant)
    run_dir = site.run_dir / KEY
    return render(KEY, request, grant, run_dir, run_dir / "tls")


def run(site: Policy, request: pb.PoolSpec, index: int = 1, **env: str) -> "subprocess.CompletedProcess[str]":
    run_dir = site.run_dir / KEY
    for name in ("tls", "tasks", "work", "logs"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    path = run_dir / "batch.sh"
    path.write_text(rendered(site, request), encoding="utf-8")
    outer = {"PATH": "/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_JOB_ID": "77", **env}
    return subprocess.run(["/bin/bash", path], env=outer, capture_output=True, text=True, timeout=120, check=False)


def seen(site: Policy) -> dict[str, object]:
    content: dict[str, object] = json.loads((site.run_dir / KEY / "tls" / "seen").read_text())
    return content


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=st.lists(VALUE, max_size=6), variables=st.dictionaries(NAMES, VALUE, max_size=6))
@example(arguments=["-c", "--", "-x"], variables={"launcher": "/bin/false", "index": "9", "run": "/etc", "IFS": "/"})
def test_the_script_gets_exactly_its_arguments_and_variables(
    site: Policy, arguments: list[str], variables: dict[str, str]
) -> None:
    request = spec(command=[PYTHON, "-c", PROBE, *arguments], env=variables)
    result = run(site, request)
    assert result.returncode == 0, result.stderr
    got = seen(site)
    assert got["argv"] == arguments
    env = got["env"]
    assert isinstance(env, dict)
    for name, value in variables.items():
        if name not in BASH_OWN:
            assert env[name] == value
    assert env["ISTHMUS_INDEX"] == "1" and env["ISTHMUS_JOB_UID"] == request.job_uid
    assert not Path("/tmp/owned").exists()  # noqa: S108


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    environment=st.sampled_from(sorted(SITE_ENVIRONMENTS)),
    arguments=st.lists(VALUE, min_size=1, max_size=4),
    variables=st.dictionaries(NAMES, VALUE, max_size=4),
    data=st.sampled_from(["", "cohort-a"]),
)
def test_every_environment_renders_to_what_bash_reads(
    site: Policy, environment: str, arguments: list[str], variables: dict[str, str], data: str
) -> None:
    text = rendered(site, spec(environment=environment, command=arguments, env=variables, data_ref=data, image="x/y:1"))
    checked = subprocess.run(["/bin/bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("environment", sorted(SITE_ENVIRONMENTS))
def test_shellcheck(site: Policy, environment: str, tmp_path: Path, require: object) -> None:
    import shutil

    assert callable(require)
    require(shutil.which("shellcheck") is not None, "install Debian's package shellcheck")
    path = tmp_path / "batch.sh"
    path.write_text(rendered(site, spec(environment=environment, image="x/y:1", data_ref="cohort-a")))
    checked = subprocess.run(["shellcheck", "-S", "warning", path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_no_variable_of_bash_makes_it_run_the_value(site: Policy, tmp_path: Path) -> None:
    listed = subprocess.run(["/bin/bash", "-c", "compgen -v"], capture_output=True, text=True, check=True)
    names = listed.stdout.split()
    names += ["RANDOM", "SRANDOM", "SECONDS", "LINENO", "HISTCMD", "EPOCHSECONDS", "BASHPID", "OPTIND", "COLUMNS",
              "BASH_COMPAT", "BASH_XTRACEFD", "DIRSTACK", "FUNCNAME", "IGNOREEOF", "TMOUT"]  # fmt: skip
    owned = tmp_path / "owned"
    variables = dict.fromkeys(names, f"a[$(touch {owned})]")
    for name in ("PATH", "BASH_ENV", "ENV", "LD_PRELOAD"):
        variables.pop(name, None)
    result = run(site, spec(command=[PYTHON, "-c", PROBE], env=variables))
    assert not owned.exists()
    assert result.returncode == 0, result.stderr
    env = seen(site)["env"]
    assert isinstance(env, dict)
    assert env["RANDOM"] == f"a[$(touch {owned})]"


def test_the_environment_of_a_task(site: Policy) -> None:
    result = run(site, spec(command=[PYTHON, "-c", PROBE], data_ref="cohort-a", attempt=4), 2, SLURM_RESTART_COUNT="3")
    assert result.returncode == 0, result.stderr
    env, run_dir = seen(site)["env"], site.run_dir / KEY
    assert isinstance(env, dict)
    told = {name: value for name, value in env.items() if name.startswith("ISTHMUS_")}
    assert told == {
        "ISTHMUS_ENDPOINT": "aggregator.example:7443",
        "ISTHMUS_SERVER_NAME": "5e2b-uid.aggregator.isthmus.dev",
        "ISTHMUS_TLS_DIR": str(run_dir / "tls"),
        "ISTHMUS_JOB_UID": "5e2b-uid",
        "ISTHMUS_JOB": "default/fashion",
        "ISTHMUS_POOL": "lumi",
        "ISTHMUS_POOL_SIZE": "3",
        "ISTHMUS_INDEX": "2",
        "ISTHMUS_CLIENT": "4",
        "ISTHMUS_CLIENTS": "5",
        "ISTHMUS_ATTEMPT": "4003",
        "ISTHMUS_STEP": "",
        "ISTHMUS_DATA": "/data/co hort",
        "ISTHMUS_AUDIT_DIR": str(run_dir / "work" / "2" / AUDIT_FOLDER),
    }
    assert (run_dir / "work" / "2" / AUDIT_FOLDER).is_dir()
    assert env["PYTHONUNBUFFERED"] == "1"
    assert seen(site)["cwd"] == str(run_dir / "work" / "2")
    assert (run_dir / "tasks" / "2.exit").read_text() == "77 3 0\n"


@pytest.mark.parametrize("code", [0, 1, 7, 143])
def test_the_exit_code_is_the_commands(site: Policy, code: int) -> None:
    assert run(site, spec(command=["sh", "-c", f"exit {code}"])).returncode == code
    assert (site.run_dir / KEY / "tasks" / "1.exit").read_text() == f"77 0 {code}\n"


def test_a_command_that_is_not_there(site: Policy) -> None:
    result = run(site, spec(command=["no-such-program"]))
    assert result.returncode == 127
    assert "no-such-program" in result.stderr


def test_a_failing_set_up_ends_the_task(site: Policy) -> None:
    result = run(site, spec(environment="set-up", command=["touch", "never"]))
    assert result.returncode == 1
    assert "the task failed while running set-up line 2: false (exit code 1)" in result.stderr
    assert not (site.run_dir / KEY / "work" / "1" / "never").exists()


PROFILE = '[ -n "$PS1" ] && alias ll="ls -l"\n'
CONDA = "_activate() { local x; x=$(grep -c nothing /dev/null); export CC=gcc; }\n_activate\nexport PREFIX=/opt/env\n"


@pytest.mark.parametrize(
    ("lines", "failure"),
    [
        ([". {dir}/profile.sh", "source {dir}/conda.sh # as conda writes it"], ""),
        ([". {dir}/missing.sh"], "running set-up line 1: . {dir}/missing.sh (exit code 1)"),
        ([". {dir}/profile.sh; false"], "running set-up line 1: . {dir}/profile.sh; false (exit code 1)"),
        (["if true; then", "  export SITE=x", "fi", "test $SITE = x"], ""),
        (["true", "f() {", "  return 7", "}", "f"], "running set-up line 5: f (exit code 7)"),
        (["cat <<END >/dev/null", "it's", "END", "false \\", "  || true"], ""),
        (["true | false"], "running set-up line 1: true | false (exit code 1)"),
        (["exit 9"], "running set-up line 1: exit 9 (exit code 9)"),
        (["if true; then"], "exit code"),
    ],
)
def test_the_status_of_a_set_up_line_counts_and_not_what_runs_in_it(
    tmp_path: Path, lines: list[str], failure: str
) -> None:
    (tmp_path / "profile.sh").write_text(PROFILE)
    (tmp_path / "conda.sh").write_text(CONDA)
    setup = [line.replace("{dir}", str(tmp_path)) for line in lines]
    own = policy(tmp_path, environments={"plain": {"prefix": ["env"], "setup": setup}})
    result = run(own, spec(command=["echo", "the script runs"]))
    if failure == "exit code":  # bash itself reports a line that it cannot parse
        assert result.returncode != 0 and "syntax error" in result.stderr
    elif failure:
        assert "the task failed while " + failure.replace("{dir}", str(tmp_path)) in result.stderr
        assert result.stdout == ""
    else:
        assert (result.returncode, result.stdout) == (0, "the script runs\n"), result.stderr


@pytest.mark.parametrize("kind", [{"prefix": ["launch", "--"]}, {"apptainer": "/x.sif"}])
def test_a_jobs_variables_act_inside_of_the_container_alone(tmp_path: Path, kind: dict[str, object]) -> None:
    """The fake launcher records its environment, and executes the command after the image or the dashes."""
    for name in ("launch", "apptainer"):
        (tmp_path / name).write_text(
            f"#!/bin/bash\n/usr/bin/env -0 >{tmp_path}/outside\n"
            'while [ "$1" != -- ] && [ "$1" != /x.sif ]; do shift; done; shift; exec "$@"\n'
        )
        (tmp_path / name).chmod(0o755)
    plain = {**kind, "env": {"PATH": f"{tmp_path}:/usr/bin:/bin"}}
    own = policy(tmp_path, env_denied=[], environments={"plain": plain})
    hostile = {name: f"/job/{name}\nx" for name in (
        "PATH", "OPENSSL_CONF", "OPENSSL_MODULES", "CURL_HOME", "SSL_CERT_FILE", "HTTPS_PROXY", "HOSTALIASES", "HOME",
        "REGISTRY_AUTH_FILE", "JAVA_TOOL_OPTIONS", "GIT_SSH_COMMAND", "PYTHONPATH", "TMPDIR", "LD_LIBRARY_PATH",
    )}  # fmt: skip
    result = run(own, spec(command=["/usr/bin/env", "-0"], env=hostile))
    assert result.returncode == 0, result.stderr
    outside = dict(entry.split("=", 1) for entry in (tmp_path / "outside").read_text().split("\0") if entry)
    inside = dict(entry.split("=", 1) for entry in result.stdout.split("\0") if entry)
    assert {name: inside.get(name) for name in hostile} == hostile
    assert not any(outside.get(name, "").startswith("/job/") for name in hostile)
    assert not any(name.startswith("ISTHMUS_ENV_") for name in inside)


def test_a_container_gets_the_paths_inside_it(site: Policy, tmp_path: Path) -> None:
    program = tmp_path / "ch-run"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$ISTHMUS_TLS_DIR" "$ISTHMUS_DATA" "$ISTHMUS_AUDIT_DIR"\n')
    program.chmod(0o755)
    request = spec(environment="container", command=["python3", "x y"], data_ref="cohort-a", image="reg/x:1",
                   env={"PATH": "/elsewhere"})  # fmt: skip
    run_dir = site.run_dir / KEY
    binds = [f"--bind={run_dir}/tls:/mnt/0", f"--bind={run_dir}/work/1:/mnt/1"]
    unpack = 'command export "$ISTHMUS_ENV_0" 2>/dev/null; unset ISTHMUS_ENV_0; exec "$@"'
    command = ["reg/x:1", "--", "sh", "-c", unpack, "sh", "python3", "x y"]
    result = run(site, request, PATH=f"{tmp_path}:/usr/bin:/bin")
    told = ["/mnt/0", "/mnt/2", "/mnt/1/.isthmus-audit"]
    assert result.stdout.splitlines() == [*binds, "--bind=/data/co hort:/mnt/2", *command, *told]
    request.data_ref = ""
    result = run(site, request, PATH=f"{tmp_path}:/usr/bin:/bin")
    told[1] = ""
    assert result.stdout.splitlines() == [*binds, *command, *told], "an argument with {data} goes without it"


def test_a_prefix_that_the_node_lacks(site: Policy) -> None:
    result = run(site, spec(environment="nowhere"))
    assert (result.returncode, result.stderr.strip()) == (
        127,
        "isthmus: no-such-launcher is not on this node\n"
        "isthmus: the task failed while preparing the environment (exit code 127)",
    )


@pytest.mark.parametrize("kind", ["setup", "env"])
@pytest.mark.parametrize("launcher", [{"apptainer": "/x.sif"}, {"prefix": ["apptainer", "exec", "/x.sif"]}])
def test_the_set_up_leads_to_the_launcher(tmp_path: Path, launcher: dict[str, object], kind: str) -> None:
    (tmp_path / "apptainer").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "apptainer").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    lead = {"setup": [f"export PATH='{path}'"]} if kind == "setup" else {"env": {"PATH": path}}
    own = policy(tmp_path, environments={"plain": {**launcher, **lead}})
    result = run(own, spec(command=["train"]))
    assert (result.returncode, result.stderr) == (0, "")
    assert (result.stdout.splitlines()[0], result.stdout.splitlines()[-2:]) == ("exec", ["/x.sif", "train"])


@pytest.mark.parametrize(("handler", "code"), [("trap 'echo bye; exit 5' TERM;", 5), ("", 143)])
def test_sigterm_reaches_the_script_and_its_own_end_counts(site: Policy, handler: str, code: int) -> None:
    run(site, spec(command=["true"]))  # creates the directories
    path, ready = site.run_dir / KEY / "batch.sh", site.run_dir / KEY / "work" / "1" / "ready"
    ready.unlink(missing_ok=True)
    command = ["sh", "-c", f"{handler} touch ready; while :; do sleep 0.05; done"]
    path.write_text(rendered(site, spec(command=command)))
    env = {"PATH": "/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "77"}
    process = subprocess.Popen(["/bin/bash", path], env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)  # only to the batch shell, as Slurm does
    assert process.wait(60) == code
    assert (site.run_dir / KEY / "tasks" / "1.exit").read_text() == f"77 0 {code}\n"


def test_a_client_that_shares_its_job_gets_its_own_number(site: Policy) -> None:
    request = spec(command=[PYTHON, "-c", PROBE], clients_per_job=2, replicas=5, total_clients=7)
    result = run(site, request, 2, SLURM_PROCID="0", SLURM_RESTART_COUNT="1")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    env, run_dir = seen(site)["env"], site.run_dir / KEY
    assert isinstance(env, dict)
    assert (env["ISTHMUS_INDEX"], env["ISTHMUS_CLIENT"], env["ISTHMUS_ATTEMPT"]) == ("4", "6", "1001")
    assert seen(site)["cwd"] == str(run_dir / "work" / "4")
    assert (run_dir / "tasks" / "4.exit").read_text() == "77 1 0\n"
    assert (run_dir / "logs" / "4.log").read_text() == "", "its words go to a log of its own"


@pytest.mark.parametrize(("job", "clients"), [(0, 2), (1, 2), (2, 1)])
def test_a_job_starts_its_clients_and_the_last_one_those_that_are_left(tmp_path: Path, job: int, clients: int) -> None:
    request = spec(clients_per_job=2, replicas=5, cpus_per_task=3)
    text = render_job(KEY, request, [Gres("gpu", "a100", 2), Gres("shard", "", 1)], Path("/runs/it's/client.sh"))
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": str(job)}
    result = subprocess.run(["/bin/bash", "-c", text], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "--nodes=1", f"--ntasks={clients}", "--cpus-per-task=3", "--gpus-per-task=a100:2", "--kill-on-bad-exit=0",
        "--wait=0", "--export=ALL", "--input=none", "--mpi=none", "--", "/bin/bash", "/runs/it's/client.sh",
    ]  # fmt: skip


def test_the_template_cannot_forget_to_quote() -> None:
    with pytest.raises(TypeError, match="unquoted value"):
        _only_safe("text")
    assert _only_safe(quote("a b")) == "'a b'"
    with pytest.raises(ValueError, match="NUL"):
        quote("a\0b")


def test_the_comment_in_the_queue() -> None:
    assert comment(spec(), "isthmus://operator/prod") == "isthmus default/fashion/lumi for operator/prod"
    assert comment(spec(job="a b\n%j"), "spiffe://a b%j") == "isthmus default/a_b__j/lumi for spiffe_//a_b_j"


def test_a_process_that_outlived_its_requeue_writes_no_marker(site: Policy) -> None:
    """Slurm gave up its node and restarted the task, while the old process kept running."""
    tasks = site.run_dir / KEY / "tasks"
    started_again = f"printf '77 1 n2\\n' >{shlex.quote(str(tasks / '6.start'))}; exit 9"
    assert run(site, spec(replicas=9, command=["sh", "-c", started_again]), index=6).returncode == 9
    assert not (tasks / "6.exit").exists()
    assert run(site, spec(replicas=9, command=["true"]), index=6, SLURM_RESTART_COUNT="1").returncode == 0
    assert (tasks / "6.exit").read_text() == "77 1 0\n"
    # An attempt of an earlier array never counts as newer.
    (tasks / "6.start").write_text("76 5 n2\n")
    run(site, spec(replicas=9, command=["true"]), index=6)
    assert (tasks / "6.exit").read_text() == "77 0 0\n"


def test_markers_of_an_earlier_start_are_ignored(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, KEY)
    directory.create({"tls.key": b"key"})
    tasks = tmp_path / KEY / "tasks"
    (tasks / "0.start").write_text("77 1 n2\n")
    (tasks / "0.exit").write_text("77 0 9\n")
    assert directory.task_markers()[0] == TaskMarker(77, "n2", None)
    (tasks / "0.exit").write_text("77 1 0\n")
    assert directory.task_markers()[0] == TaskMarker(77, "n2", 0)
