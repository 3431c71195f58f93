"""Virtual environments for the other frameworks: pinned versions from PyPI, in one directory each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def environment(name: str) -> Path:
    """Return the directory of an environment's programs; create it if it is missing or has other versions."""
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
