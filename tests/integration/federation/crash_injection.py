"""Aggregators that kill themselves at a chosen point, and clients, forked from one process that has imported torch.

``python crash_injection.py`` reads a JSON line for each process from standard input:
{"argv", "cwd", "env", "log", "kill_at"}. It writes {"pid"} to standard output, or for an aggregator (with kill_at),
once it has ended, {"status", "points"}.
"""

import itertools
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from isthmus.aggregator import __main__ as aggregator
from isthmus.aggregator.clients.membership import Client, Membership
from isthmus.aggregator.rounds import committer
from isthmus.aggregator.rounds.coordinator import Coordinator
from isthmus.aggregator.rounds.delivery import Delivery
from isthmus.aggregator.rounds.evaluation import Evaluations
from isthmus.aggregator.rounds.privacy_budget import PrivacyBudget
from isthmus.aggregator.rpc.push import PushHandler
from isthmus.aggregator.secure.accumulator import AccumulatorFile
from isthmus.aggregator.secure.incarnations import Incarnations
from isthmus.aggregator.secure.instance import Instance
from isthmus.aggregator.secure.journal import JournalFile
from isthmus.aggregator.secure.rounds import SecureRounds
from isthmus.aggregator.state.metrics_by_round import Progress
from isthmus.aggregator.storage import checkpoints
from isthmus.aggregator.updates.intake import Intake
from isthmus.client.session import session, transfer
from isthmus.codecs import Decoder
from isthmus.privacy import Private
from isthmus.secure_aggregation.server import ServerProtocol
from isthmus.secure_aggregation.sum_rule import SecureSum
from isthmus.strategies.averaging.fedavg import FedAvg
from isthmus.strategies.deterministic import Deterministic
from isthmus.strategies.spill import Spill
from isthmus.tensors import RawDecoder
from isthmus_contracts.wire import transport

sys.path.insert(0, str(Path(__file__).parent))
from wire_recorder import record

# Points between the first chunk of an update and the announcement of its commit.
POINTS: list[tuple[Any, str]] = [
    (RawDecoder, "__init__"), (RawDecoder, "write"), (RawDecoder, "finish"), (Decoder, "write"),
    (PushHandler, "_count"), (Intake, "early_reply"), (Intake, "_count"), (Intake, "_fold"),
    (Deterministic, "accept"), (Deterministic, "finish"), (FedAvg, "accept"), (FedAvg, "finish"), (Spill, "add"),
    (Private, "accept"), (Private, "finish"), (PrivacyBudget, "account"), (PrivacyBudget, "charge"),
    (Coordinator, "_begin_round"), (committer, "record_of"), (committer.RoundCommitter, "_updated_history"),
    (checkpoints.CheckpointStore, "save"), (checkpoints.CheckpointStore, "append"), (checkpoints, "_publishing"),
    (os, "fdatasync"), (os, "fsync"), (Path, "rename"), (Path, "unlink"),
    (Membership, "admit"), (Membership, "leave"), (Client, "send"),
    (Incarnations, "next"), (AccumulatorFile, "allocate"), (AccumulatorFile, "private"), (JournalFile, "write"),
    (SecureRounds, "start"), (SecureRounds, "accept"), (SecureRounds, "end_round"), (Instance, "freeze"),
    (Instance, "announce"), (ServerProtocol, "receive"), (ServerProtocol, "plan"), (SecureSum, "begin"),
    (SecureSum, "unmask"), (SecureSum, "finish"),
]  # fmt: skip

# Points after a model may have met the target, for processes that end at a point with a given name.
ENDING: list[tuple[Any, str]] = [
    (Evaluations, "take"), (Progress, "take"), (Coordinator, "_abandon"), (Delivery, "deliver"), (Path, "hardlink_to"),
    (checkpoints.CheckpointStore, "write_final"), (checkpoints.CheckpointStore, "write_best"),
]  # fmt: skip


def hurry() -> None:
    """Shorten clients' back-off, since their aggregator is often away for a moment."""
    session._FIRST_BACKOFF = transfer._FIRST_BACKOFF = 0.05
    session._LONGEST_BACKOFF = transfer._LONGEST_BACKOFF = 0.2
    # The maximum is also the time limit of a handshake.
    options = ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200)
    transport._CHANNEL_OPTIONS.extend([*options, ("grpc.min_reconnect_backoff_ms", 2000)])


class Doom:
    """Counter of passed points, which ends the process at a given number or at the first point of a given name."""

    def __init__(self, kill_at: int | str, trace: Path) -> None:
        self._kill_at = kill_at
        self._trace = trace.open("w", buffering=1)
        # Threads also pass points; next() gives each a different number, and skips none.
        self._numbers = itertools.count(1)

    def point(self, name: str) -> None:
        number = next(self._numbers)
        self._trace.write(f"{name}\n")
        if self._kill_at in (number, name):
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)
        label = f"{getattr(owner, '__name__', owner)}.{name}"

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.point(f"before {label}")
            result = original(*args, **kwargs)
            self.point(f"after {label}")
            return result

        setattr(owner, name, watched)


def become(request: dict[str, Any]) -> None:
    """Run the requested program in the child process."""
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = request["argv"]
    torch.set_num_threads(1)
    if request["kill_at"] is None:
        hurry()
        if "RECORD" in os.environ:
            record(Path.cwd())
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    aggregator.LINGER_SECONDS = 0.1  # no operator observes it
    doom = Doom(request["kill_at"], Path("points"))
    for owner, name in POINTS + (ENDING if isinstance(request["kill_at"], str) else []):
        doom.watch(owner, name)
    aggregator.main()


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if (child := os.fork()) == 0:
            code = 1
            try:
                become(request)
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        answer = {"pid": child}
        if request["kill_at"] is not None:
            answer["status"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
