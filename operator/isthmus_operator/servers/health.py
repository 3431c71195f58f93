"""Probes that mean something: whether the event loop turns, the work goes on and the API server was heard lately,
answered from outside of all that."""

import asyncio
import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

from isthmus_contracts.wire.http_server import BoundedThreads

from ..controllers.resync import MAX_AGE, Resync
from ..controllers.workqueue import WorkQueue
from ..metrics import LOOP_LAG

_BEAT = 1.0
# Older than this, the loop hangs; a look that takes longer than this is stuck.
MAX_BEAT_AGE = 30.0
MAX_RECONCILE = 900.0


class Health:
    """What the probes look at."""

    def __init__(self, resync: Resync) -> None:
        self._resync = resync
        self._beat = time.monotonic()
        self._queues: list[WorkQueue[str] | WorkQueue[tuple[str, str]]] = []
        self.broken = False  # a part that should run for ever has ended
        self.ready = threading.Event()  # the watches are up

    def watch(self, queue: "WorkQueue[str] | WorkQueue[tuple[str, str]]") -> None:
        """Includes a queue."""
        self._queues.append(queue)

    async def run(self) -> None:
        """Beats until cancelled."""
        while True:
            expected = time.monotonic() + _BEAT
            await asyncio.sleep(_BEAT)
            self._beat = time.monotonic()
            LOOP_LAG.set(max(0.0, self._beat - expected))

    def report(self) -> dict[str, object]:
        """The state, with the verdict of the liveness probe."""
        age = time.monotonic() - self._beat
        look = max((queue.oldest() for queue in self._queues), default=0.0)
        resynced = self._resync.age()
        return {
            # An API server that is away for long is no reason to be restarted; a list that never ends is one.
            "alive": not self.broken
            and age < MAX_BEAT_AGE
            and look < MAX_RECONCILE
            and self._resync.idle() < MAX_RECONCILE,
            # Where some namespaces are refused, the others are served.
            "ready": self.ready.is_set() and resynced < MAX_AGE and self._resync.serves(),
            "refused": dict(self._resync.refused),
            "secondsSinceBeat": round(age, 1),
            "longestLookSeconds": round(look, 1),
            "secondsSinceResync": round(resynced, 1),
        }


class _Server(BoundedThreads, HTTPServer):
    pass


def serve(health: Health, host: str, port: int) -> HTTPServer:
    """Serves /healthz and /readyz from a thread of its own: a hung loop cannot keep it from saying so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            report = health.report()
            good = {"/healthz": report["alive"], "/readyz": report["alive"] and report["ready"]}.get(self.path)
            body = json.dumps(report).encode()
            self.send_response(404 if good is None else 200 if good else 503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            with suppress(ConnectionError):  # who asked is gone
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Probes are not worth a line."""

    server = _Server((host, port), Handler)
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server
