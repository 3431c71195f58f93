"""Client without the library, with a valid certificate, that can send any message."""

import json
import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import torch

from isthmus.framing import PUSH
from isthmus.tensors import State, checksum_of, chunks_of, specs_of
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb.federation_pb2_grpc import FederationStub
from isthmus_contracts.process import files
from isthmus_contracts.wire.pki import Credentials
from isthmus_contracts.wire.transport import channel

from ..harness.aggregator_process import SERVER_NAME, UID

CALL_SECONDS = 10.0


class Peer:
    """One connection with a control stream and pushes."""

    def __init__(self, port: int, tls: Path, pool: str, index: int, **hello: Any) -> None:
        self.port, self.tls, self.pool, self.index = port, tls, pool, index
        self.attempt = int(hello.pop("attempt", 0))
        self.instance = f"hostile-{pool}-{index}"
        self.round, self.digest = 1, "unknown"
        self.channel = channel(f"127.0.0.1:{port}", Credentials.read(tls), SERVER_NAME)
        self.stub = FederationStub(self.channel)
        self._push: Any = self.channel.stream_unary(PUSH, response_deserializer=pb.PushReply.FromString)
        self._to_say: queue.Queue[pb.ClientMessage | None] = queue.Queue()
        said: dict[str, Any] = {
            "job_uid": UID, "pool": pool, "index": index, "attempt": self.attempt, "instance": self.instance,
            "evaluates": True, **hello,
        }  # fmt: skip
        self.say(pb.ClientMessage(hello=pb.Hello(**said)))
        self._call = self.stub.Control(iter(self._to_say.get, None))
        self.welcomed = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> "Peer":
        self.welcomed.wait(CALL_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._to_say.put(None)
        self.channel.close()

    def say(self, message: pb.ClientMessage) -> None:
        """Send a message on the control stream."""
        self._to_say.put(message)

    def header(self, tensors: State, **changes: Any) -> pb.UpdateHeader:
        """Return the header of an update to the round in progress."""
        fields: dict[str, Any] = {"job_uid": UID, "pool": self.pool, "index": self.index, "attempt": self.attempt,
                  "instance": self.instance, "round": self.round, "base_digest": self.digest, "num_examples": 1 << 53,
                  "tensors": specs_of(tensors)} | changes  # fmt: skip
        return pb.UpdateHeader(**fields)

    def push(
        self, header: pb.UpdateHeader, tensors: State, data: bytes | None = None, checksum: str | None = None
    ) -> pb.PushReply | None:
        """Push an update and return the reply, or ``None`` if the call fails."""
        body = b"".join(bytes(chunk) for chunk in chunks_of(tensors)) if data is None else data
        trailer = pb.Trailer(checksum=checksum_of(tensors) if checksum is None else checksum)
        return self.push_messages([pb.UpdateChunk(header=header), pb.UpdateChunk(data=body, trailer=trailer)])

    def push_messages(self, messages: Iterable[pb.UpdateChunk]) -> pb.PushReply | None:
        """Push any messages and return the reply, or ``None`` if the call fails."""
        with suppress(grpc.RpcError):
            reply: pb.PushReply = self._push(_serialized(messages), timeout=CALL_SECONDS)
            return reply
        return None

    def begin_push(self, messages: Iterable[pb.UpdateChunk]) -> Any:
        """Start a push of messages and return the call."""
        return self._push.future(_serialized(messages), timeout=CALL_SECONDS)

    def _listen(self) -> None:
        with suppress(grpc.RpcError, ValueError):
            for message in self._call:
                if message.HasField("offer"):
                    # If a model is only evaluated, the round is that of the model: 0 at first.
                    self.round, self.digest = max(message.offer.round, 1), message.offer.base_digest
                self.welcomed.set()
        self.welcomed.set()


def _serialized(messages: Iterable[pb.UpdateChunk]) -> Iterator[bytes]:
    return (message.SerializeToString() for message in messages)


def model(value: float) -> State:
    """Return a model of the job's shape, filled with one value."""
    shapes = {"0.weight": (100, 50), "0.bias": (100,), "2.weight": (1, 100), "2.bias": (1,)}
    return {name: torch.full(shape, value) for name, shape in shapes.items()}


class Tally:
    """Counts of attacks by name, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made: dict[str, int] = {}
        self._accepted = 0
        self._passes = 0

    def count(self, name: str, accepted: int) -> None:
        """Count an attack and its accepted updates."""
        self._made[name] = self._made.get(name, 0) + 1
        self._accepted += accepted
        self._write()

    def count_pass(self) -> None:
        """Count a pass through all attacks."""
        self._passes += 1
        self._write()

    def _write(self) -> None:
        content = {"made": self._made, "accepted": self._accepted, "passes": self._passes}
        files.replace(self._path, json.dumps(content).encode())
