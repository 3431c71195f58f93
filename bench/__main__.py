"""``python -m bench``: run the quick benchmarks in turn and print JSON lines, then tables.

With ``--all``, all benchmarks of docs/design/benchmarks.md except the other frameworks (``make bench-peers``).
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator

from .table import read, tables

QUICK = (
    "rounds --cases tiny medium",
    "wire --parameters 10000 2500000",
    "aggregation --parameters 10000 2500000",
    "memory --clients 4 16 --parameters 10000000",
    "memory --library --parameters 10000000",
    "codecs --parameters 1000000",
    "secure --cases tiny medium --turns 3",
)
ALL = (
    "rounds",
    "wire",
    "aggregation",
    "memory --clients 4 64",
    "memory --library",
    "codecs --parameters 1000000",
    "codecs --accuracy",
    "strategies",
    "privacy",
    "secure",
    "secure_parts",
    "soak",
)


def main() -> None:
    """Run the benchmarks; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="run all at full size; takes hours and 8 GB of memory")
    options = parser.parse_args()
    lines: list[str] = []
    for command in ALL if options.all else QUICK:
        name, *arguments = command.split()
        for line in output(f"bench.{name}", *arguments):
            print(line, flush=True)
            lines.append(line)
    print(f"\n{tables(read(lines))}")


def output(module: str, *arguments: str) -> Iterator[str]:
    """Yield the lines of a program as it prints them. Raises ``SystemExit`` if it fails."""
    with subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield line.rstrip("\n")
    if process.returncode:
        sys.exit(f"{module} failed ({process.returncode})")


if __name__ == "__main__":
    main()
