"""The bridge's CLI adapter with a real Slurm, whose programs lose, delay and repeat their answers on demand."""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus_bridge.slurm.cli import CliAdapter
from isthmus_bridge.slurm.command import CommandTimeout, Result, run
from tests.support.fake_slurm import Crash

from .slurm_site import slurm

PROGRAMS = ("sbatch", "squeue", "sacct", "scancel", "scontrol")
# Slurm's message.
FULL = (
    "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: "
    "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
)
# A slow sbatch submits after this number of squeue calls, far more than absence_lookups.
LOOKS = 16


class DisturbedCli(CliAdapter):
    """Adapter that runs Slurm's real programs and injects faults around them."""

    def __init__(self, first: str = "") -> None:
        """Create the adapter. ``first`` is the fault of the first sbatch; it precedes those of ``script``."""
        super().__init__(runner=self._program)
        self._first = first
        self.script: list[str] = []
        self.interrupts: list[Callable[[], object]] = []
        self.down = ""
        self.accounts_down = ""
        self.keeps_accounts = True
        self.names: set[str] = set()
        """Names of all requested arrays."""
        self.astray: dict[str, str] = {}
        """Fault of each program's next answer: "unasked" (never sent), "unheard" (lost), "twice" or "late"."""
        self._orphans: list[subprocess.Popen[bytes]] = []
        self._looks_left = 0

    @property
    def doubles(self) -> int:
        """Number of arrays per name beyond the first. Slurm does not forget the first that quickly."""
        return sum(max(0, len(_arrays(name, "all")) - 1) for name in self.names)

    def living(self, name: str) -> list[int]:
        """Return the ids of the live arrays of that name, as squeue shows them."""
        return _arrays(name)

    def living_tasks(self, name: str) -> list[int]:
        """Return the indices of their live tasks."""
        return [int(index) for index in slurm("squeue", "-h", "-r", f"--name={name}", "-o", "%K").split()]

    @property
    def hangs(self) -> bool:
        """True while a slow sbatch has not submitted yet."""
        return self._looks_left > 0

    def release(self) -> None:
        """Let each sbatch that outlived its bridge or its time limit finish, and wait for its end."""
        self._looks_left = 0
        while self._orphans:
            self._orphans.pop().communicate(timeout=120)

    def _interrupt(self) -> None:
        if self.interrupts:
            self.interrupts.pop(0)()

    def _program(self, argv: Sequence[str], **options: Any) -> Result:
        program = next(name for word in argv if (name := Path(word).name) in PROGRAMS)
        how = self.astray.pop(program, "")
        if how != "late":
            self._interrupt()
        away = self.accounts_down if program == "sacct" else self.down if program != "sbatch" else ""
        if away or how == "unasked":
            raise CommandTimeout(f"{program} did not answer in time")
        if program == "sacct" and not self.keeps_accounts:
            return Result(0, "", "")
        result = self._sbatch(argv, **options) if program == "sbatch" else run(argv, **options)
        if program == "squeue" and self.hangs:
            self._looks_left -= 1
            if not self.hangs:
                self.release()
        if how == "unheard":
            raise CommandTimeout(f"{program} did not answer in time")
        if how == "late":
            # The state changes after the answer was produced.
            self._interrupt()
        return Result(result.status, result.output * 2, result.errors) if how == "twice" else result

    def _sbatch(self, argv: Sequence[str], **options: Any) -> Result:
        self.names |= {word.removeprefix("--job-name=") for word in argv if word.startswith("--job-name=")}
        what = self._first or (self.script.pop(0) if self.script else "ok")
        self._first = ""
        if what == "full":
            return Result(1, "", FULL)
        if what == "crash-before":
            raise Crash
        if what == "crash-after":
            # The bridge dies while sbatch runs.
            self._abandon(argv, **options)
            raise Crash
        if what == "slow":
            self._looks_left = LOOKS
            self._abandon(["/bin/sh", "-c", 'read -r _; exec "$@"', "sh", *argv], **options)
        if what in ("lost", "slow"):
            raise CommandTimeout("sbatch did not answer in time")
        if what == "refused":
            argv = ["--partition=nowhere" if word.startswith("--partition=") else word for word in argv]
        result = run(argv, **options)
        if what == "heard":
            raise CommandTimeout("sbatch did not answer in time")
        return result

    def _abandon(self, argv: Sequence[str], *, env: Mapping[str, str], inherit: Sequence[int], **_: Any) -> None:
        orphan = subprocess.Popen(
            list(argv), env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, pass_fds=tuple(inherit),
        )  # fmt: skip
        self._orphans.append(orphan)


def _arrays(name: str, states: str = "") -> list[int]:
    which = [f"--states={states}"] if states else []
    return sorted({int(word) for word in slurm("squeue", "-h", "-r", *which, f"--name={name}", "-o", "%F").split()})
