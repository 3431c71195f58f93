"""Virtual environments for the other frameworks: their pinned versions, from PyPI, each in a place of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def environment(name: str) -> Path:
    """The directory of an environment's programs, which is made where it is missing or of other versions."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isthmus" / "peers" / name
    wanted, present = HERE / f"{name}.txt", cache / "installed.txt"
    if not present.exists() or present.read_text() != wanted.read_text():
        print(f"installing {name} into {cache}", file=sys.stderr, flush=True)
        if not (cache / "bin" / "pip").exists():
            shutil.rmtree(cache, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", cache], check=True)
        pip: list[str | Path] = [cache / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--requirement", wanted], check=True, stdout=sys.stderr)
        shutil.copy(wanted, present)
    return cache / "bin"
