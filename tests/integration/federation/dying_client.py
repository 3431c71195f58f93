"""Training script that ends itself (SIGKILL) just before a step of secure aggregation, or trains as linear_model.py.

DIE: step of the client ("advertise", "shares", "push", "consent", "unmask") and round, such as "push:3". It dies in
place of sending that step for that round.
"""

import os
import runpy
import signal
from collections.abc import Iterator
from pathlib import Path

from isthmus.client.session.session import Session
from isthmus.framing import first_update_frame
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa

STEP, _, ROUND = os.environ.get("DIE", ":0").partition(":")


def die(step: str | None, number: int) -> None:
    if (step, number) == (STEP, int(ROUND)):
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    send, handle, push_one, push = Session.send, Session._handle, Session.push_one, Session.push
    rounds: dict[int, int] = {}

    def watched_handle(self: Session, message: pb.ServerMessage) -> bool:
        if message.secure.HasField("begin"):
            begin = message.secure.begin
            rounds[begin.incarnation] = begin.round if begin.purpose == sa.SecureBegin.TRAIN else 0
        return handle(self, message)

    def watched_send(self: Session, message: pb.ClientMessage) -> None:
        if message.HasField("secure"):
            die(message.secure.WhichOneof("step"), rounds[message.secure.incarnation])
        send(self, message)

    def watched_push_one(self: Session, message: bytes) -> pb.PushReply:
        die("push", first_update_frame(message).header.round)
        return push_one(self, message)

    def watched_push(self: Session, messages: Iterator[bytes]) -> pb.PushReply:
        first = next(messages)
        die("push", first_update_frame(first).header.round)

        def again() -> Iterator[bytes]:
            yield first
            yield from messages

        return push(self, again())

    Session.send, Session._handle = watched_send, watched_handle  # type: ignore[method-assign]
    Session.push_one, Session.push = watched_push_one, watched_push  # type: ignore[method-assign]
    runpy.run_path(str(Path(__file__).with_name("train.py")), run_name="__main__")


if __name__ == "__main__":
    main()
