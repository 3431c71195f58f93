"""Python with the caller's packages that the lab's unprivileged user can run.

The Python that runs the lab often lies where only root may look (a pyenv in /root). Then the system's Python of the
same version borrows its packages.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from lab.machine.errors import LabError

SYSTEM_PYTHON = Path("/usr/bin/python3")


def provide(folder: Path, as_user: Callable[[list[str]], list[str]]) -> Path:
    """Return the interpreter; create a virtual environment in `folder` if the user cannot read the caller's."""
    borrowed, own = folder / "bin" / "python", Path(sys.executable)
    packages = sysconfig.get_path("purelib")

    def works(interpreter: Path) -> bool:
        command = as_user([str(interpreter), "-c", "import cryptography"])
        return subprocess.run(command, capture_output=True, check=False, cwd="/").returncode == 0

    for interpreter in (own, borrowed):
        if works(interpreter):
            return interpreter
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    question = [str(SYSTEM_PYTHON), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    if subprocess.run(question, capture_output=True, text=True, check=False).stdout.strip() != version:
        raise LabError(
            f"{own} is unreadable for the lab's user, and {SYSTEM_PYTHON} is no Python {version}; use one outside /root"
        )
    subprocess.run([SYSTEM_PYTHON, "-m", "venv", "--without-pip", "--clear", folder], check=True)
    # addsitedir, not a plain line: it also follows the .pth files of packages installed with `pip install -e`.
    hook = folder / "lib" / f"python{version}" / "site-packages" / "borrowed.pth"
    hook.write_text(f"import site; site.addsitedir({packages!r})\n")
    if not works(borrowed):
        raise LabError(
            f"the lab's user cannot read {packages}; move the checkout to a directory that every user can read"
        )
    return borrowed
