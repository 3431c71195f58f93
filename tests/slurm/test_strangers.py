"""A bridge with a low limit of open files keeps submitting despite hundreds of silent connections."""

import socket
import time
from contextlib import ExitStack
from pathlib import Path

from isthmus_contracts.pb import bridge_pb2 as pb

from .slurm_site import Site, ensure, get, over, running, spec

SILENT = 400
FILES = 256


def test_silent_connections_take_no_descriptors_from_the_bridges_work(site: Site) -> None:
    site.limit_files(FILES)
    site.settings["metrics_listen"] = "127.0.0.1:0"
    operator = site.start()
    ports = [int(address.rpartition(":")[2]) for address in site.listens()]
    assert len(ports) == 2, "the bridge's own and the metrics'"
    key, later = site.key(), site.key()
    ensure(operator, key, spec())
    with ExitStack() as stack:
        for port in ports:
            for _ in range(SILENT):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        began = time.monotonic()
        # A new caller.
        newcomer = site.stub()
        assert get(newcomer, key).phase in (pb.Pool.PENDING, pb.Pool.RUNNING)
        ensure(newcomer, later, spec(command=["true"]))
        assert over(newcomer, later).phase == pb.Pool.SUCCEEDED
        running(newcomer, key)
        assert len(list(Path(f"/proc/{site.pid}/fd").iterdir())) < FILES - 32
        assert time.monotonic() - began < 120
    log = (site.folder / "bridge.log").read_text()
    assert "Too many open files" not in log and "descriptor" not in log, log
    assert '"level": "error"' not in log, log
