"""A client's side of the protocol over all instances of a job."""

import math

from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.secure_sums import FEWEST_CLIENTS
from isthmus_contracts.wire.parties import Signer, Trust

from ..parameters import LONGEST_NAME, MOST_ATTEMPTS, UpdateKey
from ..refusal import Reason, Refusal
from ..roster import CredentialCache
from .instance import Identity, Instance, Masks

_RINGS = (16, 32)


class ClientProtocol:
    """A client's part in the instances of a job, one after another.

    It trusts nothing that the server says: a demand that could expose an update raises :class:`Refusal`, after which
    the client takes no further part in that instance. Not thread-safe.
    """

    def __init__(
        self, job_uid: str, pool: str, index: int, attempt: int, instance: str, signer: Signer, trust: Trust,
        seen: int = 0,
    ) -> None:  # fmt: skip
        """``instance``: of the client's process. ``seen``: the highest incarnation that was seen before."""
        self._identity = Identity(job_uid, pool, index, attempt, instance, signer)
        self._trust = trust
        self._credentials = CredentialCache(trust, job_uid)
        self.seen = seen
        """The highest incarnation so far."""
        self._newest: pb.SecureBegin | None = None
        # Dropped, with all its secrets, where it was refused or has ended.
        self._instance: Instance | None = None
        # By purpose, the newest round of which an update was opened, and the update's attempt.
        self._opened: dict[int, tuple[int, int]] = {}

    @property
    def begin(self) -> pb.SecureBegin | None:
        """The terms of the present instance; ``None`` before the first, and after one was refused or has ended."""
        return self._instance.begin if self._instance is not None and not self._instance.over else None

    @property
    def masks(self) -> Masks | None:
        """The keys of the masks for the update of the present instance; ``None`` before they are agreed on."""
        return self._instance.masks if self._instance is not None else None

    @property
    def opened(self) -> bool:
        """True if the update of the newest instance is in a sum that the server could open, of this or another one."""
        return self._newest is not None and self._was_opened(self._newest)

    def receive(self, message: pb.SecureServerMessage) -> list[pb.SecureClientMessage]:
        """Take a message of the server, and return the answers to it.

        A repeated message gets the answer of the first time, also after the end: a server that was restarted may ask
        again. Messages of earlier instances, and of one that was refused, get none. Raises :class:`Refusal`.
        """
        if message.HasField("begin"):
            return self._begin(message)
        instance = self._instance
        if message.incarnation < self.seen or (message.incarnation == self.seen and instance is None):
            return []
        if message.HasField("end"):
            if instance is not None and message.incarnation == self.seen:
                instance.retire()
            return []
        if instance is None or message.incarnation != instance.begin.incarnation:
            raise Refusal(Reason.ORDER, f"a message of instance {message.incarnation} came before its begin")
        try:
            if message.HasField("survivors") and not instance.consented and self._was_opened(instance.begin):
                raise Refusal(Reason.OPENED, "the update is in a sum already that was opened")
            answers = instance.receive(message)
        except Refusal:
            self._instance = None
            raise
        if instance.consented:
            # From here on others may open the sum, whatever this client sees of it.
            self._opened[instance.begin.purpose] = (instance.begin.round, instance.begin.attempt)
        return answers

    def contributed(self, update_key: UpdateKey) -> None:
        """Note that the masks of the present instance are about to cover an update.

        Call it before the first byte is sent. Raises :class:`Refusal` if they cover another update already, if the
        update is for another round or base model, or if it is in an opened sum.
        """
        instance = self._instance
        if instance is None or instance.over or instance.masks is None:
            raise Refusal(Reason.ORDER, "there are no masks: the instance has ended, or has not come so far")
        begin = instance.begin
        if (update_key.round, update_key.base_digest, update_key.attempt) != (
            begin.round, begin.base_digest, begin.attempt,
        ):  # fmt: skip
            raise Refusal(
                Reason.BASE,
                f"the update is for round {update_key.round}, base model {update_key.base_digest}, attempt "
                f"{update_key.attempt}; the instance is for {begin.round}, {begin.base_digest}, {begin.attempt}",
            )
        if instance.covers not in (None, update_key):
            raise Refusal(Reason.REUSE, "the masks of this instance cover another update: they would not hide it")
        if instance.covers is None and self._was_opened(begin):
            raise Refusal(Reason.OPENED, "the update is in a sum already that was opened")
        instance.covers = update_key

    def _begin(self, message: pb.SecureServerMessage) -> list[pb.SecureClientMessage]:
        begin = message.begin
        if message.incarnation != begin.incarnation:
            raise Refusal(Reason.INCARNATION, f"instance {message.incarnation} begins as {begin.incarnation}")
        if self._newest is not None and begin.incarnation == self._newest.incarnation:
            if self._newest != begin:
                self._instance = None
                raise Refusal(Reason.CHANGED, f"instance {begin.incarnation} began a second time with other terms")
            return self._instance.advertise() if self._instance is not None else []
        if begin.incarnation <= self.seen:
            raise Refusal(Reason.INCARNATION, f"instance {begin.incarnation} is not above {self.seen}: it was replayed")
        self.seen = begin.incarnation
        self._instance = None
        self._newest = pb.SecureBegin()
        self._newest.CopyFrom(begin)
        _check(begin)
        self._check_noise(begin)
        self._check_round(begin)
        self._instance = Instance(self._identity, self._newest, self._trust, self._credentials)
        return self._instance.advertise()

    def _check_noise(self, begin: pb.SecureBegin) -> None:
        wanted, noise = self._trust.noise_multiplier, begin.layout.noise.noise_multiplier
        if wanted is None or begin.purpose != pb.SecureBegin.TRAIN or (noise > 0 and noise >= wanted):
            return
        demanded = f"a noise multiplier of {wanted:g} or more" if wanted else "noise"
        raise Refusal(
            Reason.NOISE,
            f"this site demands {demanded} from the clients (noise: Distributed), and the round has {noise:g}",
        )

    def _check_round(self, begin: pb.SecureBegin) -> None:
        if begin.purpose == pb.SecureBegin.EVALUATE:
            self._check_evaluation(begin)
        newest, _ = self._opened.get(begin.purpose, (0, 0))
        if begin.round < newest:
            raise Refusal(Reason.ROUND, f"round {begin.round} is over: an update of round {newest} was opened")
        if begin.attempt > MOST_ATTEMPTS:
            raise Refusal(Reason.RETRAINED, f"round {begin.round} was done again already: it may be done twice only")
        if self._was_opened(begin):
            raise Refusal(
                Reason.OPENED,
                f"the update of round {begin.round} is in a sum already that was opened, or may have been",
            )

    def _check_evaluation(self, begin: pb.SecureBegin) -> None:
        """Refuse a second sum of evaluations, over other clients or of another model than the first.

        Measurements are not trained again: they hardly change, so the difference would be one client's.
        """
        if begin.attempt:
            raise Refusal(Reason.RETRAINED, f"the evaluation of round {begin.round} is asked for again: it may not be")
        if self._was_opened(begin):
            raise Refusal(
                Reason.OPENED, "a sum of evaluations was opened already, or may have been: a client opens one only"
            )

    def _was_opened(self, begin: pb.SecureBegin) -> bool:
        if begin.purpose == pb.SecureBegin.EVALUATE:
            return begin.purpose in self._opened
        return (begin.round, begin.attempt) <= self._opened.get(begin.purpose, (0, -1))


def _check(begin: pb.SecureBegin) -> None:
    """Check the form of a begin; what the layout does to the model is checked where the model is known."""
    layout = begin.layout
    problem = ""
    if begin.purpose not in (pb.SecureBegin.TRAIN, pb.SecureBegin.EVALUATE):
        problem = f"purpose {begin.purpose} is unknown"
    elif not begin.round or not 0 < len(begin.base_digest) <= LONGEST_NAME:
        problem = "round or base model is missing"
    elif begin.purpose == pb.SecureBegin.EVALUATE and layout.tensors:
        problem = "an evaluation has no tensors"
    elif layout.bits not in _RINGS:
        problem = f"a ring of {layout.bits} bits is unknown"
    elif layout.max_clients < FEWEST_CLIENTS:
        problem = f"at most {layout.max_clients} clients could take part"
    elif not math.isfinite(begin.phase_seconds) or begin.phase_seconds <= 0:
        problem = f"phases of {begin.phase_seconds} seconds"
    if problem:
        raise Refusal(Reason.LAYOUT, f"the begin of instance {begin.incarnation} is invalid: {problem}")
