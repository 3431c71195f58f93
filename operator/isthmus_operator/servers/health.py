"""Health probes, served outside the event loop: they check the loop, the queues and the lists of the API server."""

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
# An older beat means that the loop hangs; a longer reconciliation or list is stuck. Seconds.
MAX_BEAT_AGE = 30.0
MAX_RECONCILE = 900.0


class Health:
    """The state that the probes report."""

    def __init__(self, resync: Resync) -> None:
        self._resync = resync
        self._beat = time.monotonic()
        self._queues: list[WorkQueue[str] | WorkQueue[tuple[str, str]]] = []
        self.broken = False  # a task that should never end has ended
        self.ready = threading.Event()  # the watches are established

    def watch(self, queue: "WorkQueue[str] | WorkQueue[tuple[str, str]]") -> None:
        """Include a queue in the checks."""
        self._queues.append(queue)

    async def run(self) -> None:
        """Record beats of the event loop until cancelled."""
        while True:
            expected = time.monotonic() + _BEAT
            await asyncio.sleep(_BEAT)
            self._beat = time.monotonic()
            LOOP_LAG.set(max(0.0, self._beat - expected))

    def report(self) -> dict[str, object]:
        """Return the state, with the results of both probes."""
        age = time.monotonic() - self._beat
        look = max((queue.oldest() for queue in self._queues), default=0.0)
        resynced = self._resync.age()
        return {
            # Restart if a list never ends, but not for a long outage of the API server.
            "alive": not self.broken
            and age < MAX_BEAT_AGE
            and look < MAX_RECONCILE
            and self._resync.idle() < MAX_RECONCILE,
            # If some namespaces are refused, the others are still served.
            "ready": self.ready.is_set() and resynced < MAX_AGE and self._resync.serves(),
            "refused": dict(self._resync.refused),
            "secondsSinceBeat": round(age, 1),
            "longestLookSeconds": round(look, 1),
            "secondsSinceResync": round(resynced, 1),
        }


class _Server(BoundedThreads, HTTPServer):
    pass


def serve(health: Health, host: str, port: int) -> HTTPServer:
    """Serve /healthz and /readyz from a thread of its own, so that a hung event loop is reported."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            report = health.report()
            good = {"/healthz": report["alive"], "/readyz": report["alive"] and report["ready"]}.get(self.path)
            body = json.dumps(report).encode()
            self.send_response(404 if good is None else 200 if good else 503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            with suppress(ConnectionError):  # the caller is gone
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Do not log probes."""

    server = _Server((host, port), Handler)
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server
