"""The options that a site's admin can add to submissions, and the form of their values.

Only the standard library is imported, because the helper that runs as other users checks values too.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

# No value can begin like an option, or contain blanks or control characters.
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+@:-]*"
# Features, with the operators that sbatch knows: a100&nvme, [rack1|rack2], (a|b)&c, node*2.
CONSTRAINT = r"[A-Za-z0-9_(\[][A-Za-z0-9_.+:=&|,*()\[\]-]*"
NAMES = rf"{_NAME}(,{_NAME})*"
# name[@database][:count], or name=count.
LICENSES = r"[A-Za-z0-9_][A-Za-z0-9_.+@:=/-]*([,|][A-Za-z0-9_][A-Za-z0-9_.+@:=/-]*)*"
SWITCHES = r"[0-9]{1,4}(@[0-9]{1,3}(-[0-9]{1,2})?(:[0-9]{1,2}){0,2})?"
NODES = r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*"
EXCLUSIVE = ("yes", "user", "mcs")
HINTS = ("compute_bound", "memory_bound", "multithread", "nomultithread")
GRES_FLAGS = ("enforce-binding", "disable-binding")
MEMORY = ("per-node", "per-cpu", "per-gpu", "none")
GPUS = ("gres", "per-task", "per-node", "per-job")
LONGEST = 256

_FORMS: Mapping[str, re.Pattern[str]] = {
    "constraint": re.compile(CONSTRAINT),
    "reservation": re.compile(NAMES),
    "wckey": re.compile(_NAME),
    "licenses": re.compile(LICENSES),
    "switches": re.compile(SWITCHES),
    "nodelist": re.compile(NODES),
    "exclude": re.compile(NODES),
}
_CHOICES = {"exclusive": EXCLUSIVE, "hint": HINTS, "gres_flags": GRES_FLAGS, "memory": MEMORY, "gpus": GPUS}
_NUMBERS = {"nice": (-10_000, 2_147_483_645), "threads_per_core": (0, 64), "tmp_mib": (0, 1 << 30)}
# Options that an adapter does not support.
LACKING: Mapping[str, Sequence[str]] = {
    "cli": (),
    "rest": ("hint", "switches", "nodelist", "exclude", "gres_flags", "tmp_mib"),
    "pyslurm": ("hint", "switches", "nodelist", "exclude", "gres_flags", "tmp_mib"),
}


@dataclass(frozen=True)
class Options:
    """The site's own options of one submission. An empty value leaves the option out."""

    constraint: str = ""
    reservation: str = ""
    exclusive: str = ""
    wckey: str = ""
    licenses: str = ""
    hint: str = ""
    gres_flags: str = ""
    switches: str = ""
    nodelist: str = ""
    exclude: str = ""
    nice: int = 0
    threads_per_core: int = 0
    tmp_mib: int = 0
    memory: str = "per-node"
    """The way to request memory."""
    gpus: str = "gres"
    """The way to request GPUs."""

    def with_(self, changes: Mapping[str, Any]) -> "Options":
        """Return a copy with some options replaced."""
        return replace(self, **changes)

    def stated(self) -> dict[str, Any]:
        """Return the options that differ from the defaults, by name."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}


def read(content: Mapping[str, Any]) -> Options:
    """Check the result of :meth:`Options.stated`, and return the options. Raises ``ValueError``."""
    for name, value in content.items():
        if name in _NUMBERS:
            least, most = _NUMBERS[name]
            good = type(value) is int and least <= value <= most
        elif not isinstance(value, str) or len(value) > LONGEST:
            good = False
        elif name in _CHOICES:
            good = value in _CHOICES[name]
        else:
            good = name in _FORMS and _FORMS[name].fullmatch(value) is not None
        if not good:
            raise ValueError(f"malformed option {name!r}")
    return Options(**content)


def arguments(options: Options) -> Iterator[str]:
    """Yield sbatch's arguments, without memory and GPUs, whose amounts depend on the pool."""
    for name in ("constraint", "reservation", "wckey", "licenses", "hint", "switches", "nodelist", "exclude"):
        if value := getattr(options, name):
            yield f"--{name}={value}"
    if options.exclusive:
        yield "--exclusive" if options.exclusive == "yes" else f"--exclusive={options.exclusive}"
    if options.gres_flags:
        yield f"--gres-flags={options.gres_flags}"
    if options.nice:
        yield f"--nice={options.nice}"
    if options.threads_per_core:
        yield f"--threads-per-core={options.threads_per_core}"
    if options.tmp_mib:
        yield f"--tmp={options.tmp_mib}M"
