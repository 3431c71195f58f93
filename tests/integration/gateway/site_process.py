"""`isthmus-bridge` with a fake Slurm: ``python -m`` this module, then the usual arguments."""

import sys
import time

from isthmus_bridge import cli, server
from tests.support.fake_slurm import FakeSlurm

if __name__ == "__main__":
    server.slurm_adapter = lambda *_: FakeSlurm(time.time)  # type: ignore[assignment, return-value]
    sys.exit(cli.main())
