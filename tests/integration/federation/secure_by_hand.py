"""Client of secure aggregation without the client library, whose answers a test may spoil."""

import threading
from collections.abc import Callable

from isthmus.secure_aggregation.client import ClientProtocol
from isthmus.secure_aggregation.layout import wire_specs
from isthmus.secure_aggregation.parameters import UpdateKey
from isthmus.secure_aggregation.primitives.masks import add_masks
from isthmus.secure_aggregation.refusal import Refusal
from isthmus.tensors import State, allocate, checksum_of, chunks_of
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.pb import secure_aggregation_pb2 as sa
from isthmus_contracts.wire.parties import Signer

from .conftest import POOL, UID, Federation
from .secure_parties import Parties
from .test_protocol import HandMadeClient

Spoil = Callable[[int, sa.SecureClientMessage], "sa.SecureClientMessage | None"]
"""Takes a round and an answer; returns the answer to send, or nothing."""


class SecureClient(HandMadeClient):
    """Client that contributes a change of zero to each round, in a thread of its own.

    Its own answers are those of the product's :class:`ClientProtocol`.
    """

    def __init__(
        self, job: Federation, parties: Parties, index: int, spoil: Spoil,
        spoil_update: Callable[[int, pb.UpdateHeader, State], State],
    ) -> None:  # fmt: skip
        directory = job.directory / f"by-hand-{index}"
        directory.mkdir(exist_ok=True)
        parties.files(directory)
        super().__init__(job, index, evaluates=False)
        self._protocol = ClientProtocol(
            UID, POOL, index, self.attempt, self.instance, Signer.read(directory), parties.trust
        )
        self._spoil, self._spoil_update = spoil, spoil_update
        self._digests: dict[int, str] = {}
        self.replies: dict[int, list[pb.PushReply]] = {}
        """Replies to its updates, by round."""
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            for message in self.messages:
                if message.HasField("offer"):
                    self._digests[message.offer.round] = message.offer.base_digest
                elif message.HasField("secure"):
                    self._step(message.secure)
                elif message.HasField("stop"):
                    return
        except Exception as error:
            if self.channel is not None:
                raise AssertionError("the client's stream has broken") from error

    def _step(self, message: sa.SecureServerMessage) -> None:
        try:
            answers = self._protocol.receive(message)
        except Refusal as refusal:
            answers = [refusal.answer(message.incarnation)]
        begin = self._protocol.begin
        number = begin.round if begin is not None else 0
        for answer in answers:
            spoilt = self._spoil(number, answer)
            if spoilt is not None:
                self.say(pb.ClientMessage(secure=spoilt))
        if message.HasField("shares") and begin is not None and self._protocol.masks is not None:
            self._contribute(begin)

    def _contribute(self, begin: sa.SecureBegin) -> None:
        masks = self._protocol.masks
        assert masks is not None
        self._protocol.contributed(UpdateKey(begin.round, begin.base_digest, begin.attempt, "zero"))
        specs = wire_specs(begin.layout)
        tensors = {spec.name: allocate(spec).zero_() for spec in specs}
        add_masks(tensors, masks.keys)
        header = pb.UpdateHeader(
            job_uid=UID, pool=POOL, index=self.index, attempt=self.attempt, instance=self.instance, round=begin.round,
            base_digest=self._digests[begin.round], secure_incarnation=begin.incarnation, tensors=specs,
        )  # fmt: skip
        right = pb.UpdateHeader.FromString(header.SerializeToString())
        sent = self._spoil_update(begin.round, header, tensors)
        self._hand_in(header, sent)
        if self.replies[begin.round][-1].verdict == pb.PushReply.STALE:  # the round still waits for this client
            self._hand_in(right, tensors)

    def _hand_in(self, header: pb.UpdateHeader, tensors: State) -> None:
        reply = self.push(header, chunks_of(tensors), checksum_of(tensors))
        self.replies.setdefault(header.round, []).append(reply)
