"""Third-party requirements of the named project folders, printed one a line for `pip install -r`."""

import os
import re
import sys
import tomllib
from pathlib import Path

BUILD = Path("/build")


def torch_version() -> str:
    """Return the version of torch in constraints.txt."""
    pinned = re.search(r"^torch==(\S+)", (BUILD / "constraints.txt").read_text(), re.MULTILINE)
    if pinned is None:
        sys.exit("constraints.txt does not pin torch")
    return pinned[1]


def main() -> None:
    requirements: set[str] = set()
    for folder in sys.argv[1:]:
        project = tomllib.loads((BUILD / folder / "pyproject.toml").read_text())["project"]
        requirements.update(project.get("dependencies", []))
    for requirement in sorted(requirements):
        name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
        if name == "torch":
            print(f"torch=={torch_version()}+{os.environ['TORCH_BUILD']}")
        elif not name.startswith("isthmus"):
            print(requirement)


if __name__ == "__main__":
    main()
