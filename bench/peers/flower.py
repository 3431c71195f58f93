"""Flower as deployed by its users: a SuperLink, and a SuperNode for each client."""

import os
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

from ..harness.processes import family
from .observed import Observed, memory_of, rounds_of
from .started import await_port, free_port, started

APP = Path(__file__).with_name("flower_app")
SECURE_APP = Path(__file__).with_name("flower_secure_app")
_DONE = ("finished:completed", "finished:failed", "finished:stopped")
_POLL_SECONDS = 2.0


def run(programs: Path, clients: int, parameters: int, rounds: int, directory: Path, source: Path = APP) -> Observed:
    """Run this number of rounds of the app in ``source``. Raises ``RuntimeError`` if they fail."""
    environ = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "FLWR_HOME": str(directory / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    app, times, log = directory / "app", directory / "times", directory / "log"
    shutil.copytree(source, app)
    port = free_port()
    (directory / "home").mkdir()
    (directory / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    observed = Observed()
    with ExitStack() as stack:
        link = stack.enter_context(
            started(programs / "flower-superlink", "--insecure", "--disable-runtime-dependency-installation",
                    "--port", str(port), log=log, environ=environ)
        )  # fmt: skip
        await_port(port, link)
        for _ in range(clients):
            stack.enter_context(
                started(programs / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}",
                        "--port", str(free_port()), log=log, environ=environ)
            )  # fmt: skip
        stack.enter_context(memory_of(lambda: family(link.pid), observed))
        config = f"clients={clients} parameters={parameters} rounds={rounds} times='{times}'"
        subprocess.run([programs / "flwr", "run", app, "bench", "--run-config", config],
                       env=environ, check=True, capture_output=True)  # fmt: skip
        while not any(done in listing(programs, environ) for done in _DONE):
            time.sleep(_POLL_SECONDS)
    try:
        observed.seconds = rounds_of(times)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"Flower: {error}; its log ends with:\n{log.read_text()[-3000:]}") from None
    return observed


def run_secure(programs: Path, clients: int, parameters: int, rounds: int, directory: Path) -> Observed:
    """Run this number of rounds under SecAgg+. Raises ``RuntimeError`` if they fail."""
    return run(programs, clients, parameters, rounds, directory, SECURE_APP)


def listing(programs: Path, environ: dict[str, str]) -> str:
    """Return the SuperLink's list of runs."""
    command = (programs / "flwr", "ls", "bench", "--format", "json")
    return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout
