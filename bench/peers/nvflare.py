"""NVFlare in its proof-of-concept mode: server and clients are separate processes with mutual TLS."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from .observed import Observed, memory_of, mentioning, rounds_of
from .started import started

_JOB = Path(__file__).with_name("nvflare_app") / "job.py"


def run(programs: Path, clients: int, parameters: int, rounds: int, directory: Path) -> Observed:
    """Run this number of rounds. Raises ``RuntimeError`` if they fail."""
    environ = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(directory),
        "NVFLARE_POC_WORKSPACE": str(directory / "poc"),
    }
    times, log = directory / "times", directory / "log"
    arguments = (str(clients), str(parameters), str(rounds), str(times))
    observed = Observed()
    try:
        # Servers and clients are no descendants of the process that starts them; they share the directory.
        with (
            started(programs / "python", _JOB, *arguments, log=log, environ=environ) as job,
            memory_of(lambda: mentioning(str(directory), "nvflare.private.fed.app.server"), observed),
        ):
            job.wait()
    finally:
        for pid in mentioning(str(directory)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    try:
        observed.seconds = rounds_of(times)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"NVFlare: {error}; its log ends with:\n{log.read_text()[-3000:]}") from None
    return observed
