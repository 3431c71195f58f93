"""A notebook without a browser: IPython's shell runs the cells in the file ``cells.py``, separated by ``# ---``.

A cell may contain ``# INTERRUPTED``: while it runs, the shell gets a kernel's interrupt once the file ``interrupt``
exists. THREAD: run the cells in a thread other than the main one.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
outcomes: list[str] = []


def interrupt() -> None:
    until = time.monotonic() + 600
    while not Path("interrupt").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def run_cells() -> None:
    for cell in Path("cells.py").read_text().split("# ---\n"):
        if "# INTERRUPTED" in cell:
            threading.Thread(target=interrupt, daemon=True).start()
        result = shell.run_cell(cell)
        outcomes.append(type(result.error_in_exec).__name__ if result.error_in_exec else "ok")
        Path("outcomes.json").write_text(json.dumps(outcomes))


if os.environ.get("THREAD"):
    worker = threading.Thread(target=run_cells)
    worker.start()
    worker.join()
else:
    run_cells()
