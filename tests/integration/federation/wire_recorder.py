"""Recorder of what a client sends in secure aggregation: its keys, and every masked update."""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isthmus.client.session.session import Session
from isthmus.framing import update_frame
from isthmus_contracts import identities
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa

Line = dict[str, Any]


def record(directory: Path) -> None:
    """Record, from now on, all that sessions of this process send."""
    name = "-".join(os.environ.get(each, "0") for each in (identities.ENV_INDEX, identities.ENV_ATTEMPT))
    file = (directory / f"sent-{name}-{os.getpid()}").open("a", buffering=1)

    def write(incarnation: int, step: str, content: bytes) -> None:
        file.write(json.dumps({"incarnation": incarnation, "step": step, "content": content.hex()}) + "\n")

    def write_update(messages: list[bytes]) -> None:
        frames = [update_frame(message) for message in messages]
        if frames and frames[0].header is not None and frames[0].header.round:
            header = frames[0].header
            data = b"".join(bytes(frame.data) for frame in frames)
            write(header.secure_incarnation, "push", header.SerializeToString(deterministic=True) + data)

    send, push, push_one = Session.send, Session.push, Session.push_one

    def recorded_send(self: Session, message: pb.ClientMessage) -> None:
        if message.HasField("secure"):
            step = message.secure.WhichOneof("step") or ""
            write(message.secure.incarnation, step, message.secure.SerializeToString(deterministic=True))
        send(self, message)

    def recorded_push(self: Session, messages: Iterator[bytes]) -> pb.PushReply:
        taken: list[bytes] = []

        def through() -> Iterator[bytes]:
            for message in messages:
                taken.append(bytes(message))
                yield message

        try:
            return push(self, through())
        finally:
            write_update(taken)

    def recorded_push_one(self: Session, message: bytes) -> pb.PushReply:
        write_update([bytes(message)])
        return push_one(self, message)

    Session.send, Session.push, Session.push_one = (  # type: ignore[method-assign]
        recorded_send, recorded_push, recorded_push_one,
    )  # fmt: skip


def sent(directory: Path) -> dict[str, list[Line]]:
    """Return what each recorded process has sent, by the name of its file."""
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(directory.glob("sent-*"))
    }


def check_one_input_per_mask(directory: Path) -> int:
    """Assert that no mask has covered two inputs; return the number of instances with an update.

    Each process sends the same bytes whenever it sends an update under an instance's masks, though perhaps not all of
    them, and each instance has keys of its own.
    """
    instances = set()
    for name, lines in sent(directory).items():
        updates: dict[int, set[str]] = defaultdict(set)
        answers: dict[tuple[int, str], set[str]] = defaultdict(set)
        for line in lines:
            if line["step"] == "push":
                assert line["incarnation"], f"{name} has sent an update in clear"
                updates[line["incarnation"]].add(line["content"])
            else:
                answers[line["incarnation"], line["step"]].add(line["content"])
        for incarnation, contents in updates.items():
            longest = max(contents, key=len)
            assert all(longest.startswith(content) for content in contents), (name, incarnation)
        for (incarnation, step), contents in answers.items():
            assert len(contents) == 1, (name, incarnation, step)
        advertised = {line["content"] for line in lines if line["step"] == "advertise"}
        keys = [_parsed(content).advertise.entry.mask_key for content in advertised]
        assert len(keys) == len(set(keys)), name
        instances |= set(updates)
    return len(instances)


def _parsed(content: str) -> sa.SecureClientMessage:
    return sa.SecureClientMessage.FromString(bytes.fromhex(content))
