"""Command line that writes every dashboard as JSON: ``python -m charts.dashboards DIRECTORY``."""

import json
import sys
from pathlib import Path

from . import fleet, job, site

DASHBOARDS = (fleet.DASHBOARD, job.DASHBOARD, site.DASHBOARD)


def main(directory: Path) -> None:
    """Write the dashboards and remove other files from the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.json"):
        old.unlink()
    for dashboard in DASHBOARDS:
        text = json.dumps(dashboard.json(), indent=1)
        (directory / f"{dashboard.uid}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
