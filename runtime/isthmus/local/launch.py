"""Becomes the program on its command line, which dies with the process that started it: ``launch.py PARENT PROGRAM…``.

Run by its path, in an interpreter of its own, so that the runner need not run Python code between fork and exec: it has
threads (gRPC's among them), after whose fork only exec is safe. Imports nothing but the standard library.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
EXIT_NOT_FOUND = 127


def main() -> None:
    """Ties this process to its parent and executes the program."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    try:
        os.execvp(program[0], program)  # noqa: S606 (an argument list, no shell)
    except OSError as error:
        print(f"{program[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(EXIT_NOT_FOUND)


if __name__ == "__main__":
    main()
