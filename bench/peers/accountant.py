"""Reference values of an independent privacy accountant: ``python -m bench.peers.accountant``.

Installs Google's dp-accounting from PyPI into an environment of its own, as it refuses the versions of attrs that the
tests use, and writes its epsilons to the file that tests/unit/contracts/test_skellam.py compares ours with.
"""

import subprocess
from pathlib import Path

from .environments import HERE, environment

REFERENCE = HERE.parents[1] / "tests" / "unit" / "contracts" / "accountant.jsonl"


def main(to: Path = REFERENCE) -> None:
    """Write the epsilons."""
    script = HERE / "accountant_app" / "reference.py"
    lines = subprocess.run([environment("accountant") / "python", script], check=True, stdout=subprocess.PIPE).stdout
    to.write_bytes(lines)


if __name__ == "__main__":
    main()
