"""The server's side of one instance of the protocol."""

from collections.abc import Iterable, Sequence
from typing import Any

from isthmus_contracts import secure_sums
from isthmus_contracts.pb import secure_aggregation_pb2 as pb
from isthmus_contracts.secure_sums import FEWEST_CLIENTS
from isthmus_contracts.text import one_line

from .. import graph
from ..parameters import REFUSED, ClientId, Fault, Outgoing, Participant, Phase
from ..refusal import Reason, Refusal
from ..roster import name_of
from ..transcript import Terms
from . import journal, messages
from .answers import Answers
from .correspondence import Correspondence
from .messages import CheckCredential
from .recovery import Secrets
from .setup import Setup, id_of

_ENDED = (Phase.DONE, Phase.FAILED)
# Names in a message.
_SHOWN = 5
_STEPS = {
    Phase.ADVERTISE: "advertise",
    Phase.REVEAL: "reveal",
    Phase.SHARES: "shares",
    Phase.CONSENT: "consent",
    Phase.UNMASK: "unmask",
}
_PHASES = {step: phase for phase, step in _STEPS.items()}


class ServerProtocol:
    """The server's part in one instance: a state machine without clocks, connections and tensors.

    A client's message that breaks the protocol is a fault: it drops the client from the instance. A phase ends when all
    answers are there, or at its :meth:`deadline`; :meth:`freeze` ends COLLECT. Not thread-safe.
    """

    def __init__(
        self, job_uid: str, begin: pb.SecureBegin, participants: Sequence[Participant],
        check_credential: CheckCredential | None = None, fewest: int = FEWEST_CLIENTS, parties: int = 1,
    ) -> None:  # fmt: skip
        """``fewest``, ``parties``: least numbers of survivors and of their distinct parties that the job asks for."""
        self.begin = pb.SecureBegin()
        self.begin.CopyFrom(begin)
        self.phase = Phase.ADVERTISE
        self.waiting_for: set[ClientId] = set()
        """Clients whose answer the present phase lacks."""
        self.faults: list[Fault] = []
        self.failure = ""
        """The reason of FAILED, in one line."""
        self._terms = Terms.of(job_uid, begin)
        self._fewest = max(FEWEST_CLIENTS, fewest)
        self._parties = parties
        self.participants = tuple(participants)
        """Clients that the instance began with; after :meth:`restore`, those in the roster."""
        self.dropped: dict[ClientId, str] = {}
        """Clients that the instance goes on without, and why."""
        self._mail = Correspondence(begin.incarnation, [each.id for each in participants])
        self._setup = Setup(self._terms)
        self._answers = Answers(self._setup, {each.id: each for each in participants}, check_credential)

    # ---- what the instance stands at

    @property
    def incarnation(self) -> int:
        return self.begin.incarnation

    @property
    def threshold(self) -> int:
        """The largest number of survivors that a client needs among those that hold its shares."""
        return self._setup.largest_threshold or secure_sums.threshold(graph.degree(len(self.participants)) + 1)

    @property
    def contributors_possible(self) -> frozenset[ClientId]:
        """Clients whose updates the masks are for, and that have not been dropped."""
        return self._ids(self._setup.senders) - self.dropped.keys()

    @property
    def survivors(self) -> frozenset[ClientId]:
        """Clients whose updates are in the sum; empty before they are frozen."""
        return self._ids(self._setup.survivors)

    @property
    def roster(self) -> frozenset[ClientId]:
        """Clients in the roster; empty before it is fixed."""
        return frozenset(self._setup.numbers)

    @property
    def parties(self) -> int:
        """Number of distinct parties among the survivors."""
        return len(self._setup.parties_of(self._setup.survivors))

    @property
    def culprits(self) -> frozenset[ClientId]:
        """Clients that a new instance should leave out, as they would spoil it, too."""
        return frozenset(fault.who for fault in self.faults if fault.reason not in (REFUSED, Reason.STRANGER))

    @property
    def objectors(self) -> frozenset[ClientId]:
        """Clients that object to a culprit: nothing is known that speaks against an instance with them without it."""
        culprits = self.culprits
        blames = self._answers.blames.items()
        return frozenset(who for entry, some in blames if self._id(entry) in culprits for who in some) - culprits

    def shortage(self, contributors: Iterable[ClientId]) -> str:
        """Return why the sum of these clients' updates could not be opened now; empty if it could."""
        chosen = frozenset(self._setup.numbers[who] for who in contributors)
        return self._setup.shortage(chosen, self._present(chosen), self._fewest, self._parties)

    def start(self) -> list[Outgoing]:
        """Begin the instance at all participants."""
        self.waiting_for = set(self._mail.clients)
        return [*self._mail.send(self.waiting_for, begin=self.begin), *self._go_on()]

    def receive(self, who: ClientId, message: pb.SecureClientMessage) -> list[Outgoing]:
        """Take a client's message. A fault drops the client, and is noted in :attr:`faults`; nothing is raised."""
        if message.incarnation < self.incarnation:
            return []
        if who not in self._mail.clients:
            # After a restart, the clients without an entry in the roster are forgotten.
            if self.phase <= Phase.COLLECT:
                self.faults.append(Fault(who, Reason.STRANGER, "it is not in this instance"))
            return []
        step = message.WhichOneof("step")
        # The client may not know yet that it is out of the instance, or that this has ended.
        late = who in self.dropped or self.phase in _ENDED
        if late and not (step == "refusal" and message.incarnation == self.incarnation):
            return []
        try:
            if step is None or not self._is_new(who, step, message):
                return []
            self._answers.take(who, step, getattr(message, step))
        except Refusal as fault:
            return [*self._fault(who, fault.reason, str(fault)), *self._go_on()]
        self.waiting_for.discard(who)
        return [*self._consequences(who, step, message), *self._go_on()]

    def drop(self, who: ClientId, reason: str) -> list[Outgoing]:
        """Go on without a client that has left or was replaced; an update that it has sent may still be in the sum.

        It gets no message: its successor, which has the same name, would not understand it.
        """
        if who in self._mail.clients and who not in self.dropped and self.phase not in _ENDED:
            self._note_drop(who, reason)
        return self._go_on()

    def deadline(self) -> list[Outgoing]:
        """End the present phase with the answers that are there. COLLECT has no deadline of the protocol."""
        if self.phase not in _STEPS:
            return []
        text = f"this client did not answer within {self.begin.phase_seconds:g} s in the phase {self.phase.name}"
        outs = [out for who in sorted(self.waiting_for) for out in self._out(who, text)]
        return [*outs, *(self._conclude() if self.phase is Phase.UNMASK else self._go_on())]

    def freeze(self, contributors: Iterable[ClientId]) -> list[Outgoing]:
        """Fix whose updates are in the sum: those of ``contributors``, all of them, and no others.

        Keep a :meth:`journal` before the messages are sent. The instance fails if the sum could not be opened: then no
        client has been asked for anything yet. Raises ``ValueError`` outside COLLECT, and for clients without masks.
        """
        chosen = frozenset(contributors)
        unmasked = chosen - self._ids(self._setup.senders)
        if self.phase is not Phase.COLLECT or unmasked:
            raise ValueError(f"no freeze in the phase {self.phase.name} with the clients {sorted(unmasked)}")
        if shortage := self.shortage(chosen):
            return self._fail(shortage)
        self._setup.survivors = frozenset(self._setup.numbers[who] for who in chosen)
        return [*self._ask_for_consent(), *self._go_on()]

    def resend(self, who: ClientId) -> list[Outgoing]:
        """Return all messages of the instance to a client so far, for one that has reconnected."""
        return [] if who in self.dropped else self._mail.sent(who)

    def plan(self) -> list[tuple[bytes, int]]:
        """Return the keys of the masks in the sum, with their signs, in DONE. With many dropouts this takes long."""
        if self.phase is not Phase.DONE or self._answers.secrets is None:
            raise ValueError(f"no secrets are known in the phase {self.phase.name}")
        return self._answers.secrets.plan()

    # ---- journal

    def journal(self) -> bytes:
        """Return the state from the freeze on, for :meth:`restore`. Raises ``ValueError`` before it.

        What the server has of clients' answers needs no journal: they answer again in the same way. With one, it need
        not ask again.
        """
        if self.phase < Phase.CONSENT:
            raise ValueError(f"no journal in the phase {self.phase.name}: begin a new instance")
        return journal.record(self.begin, self._answers, self.dropped.keys(), self.phase, self.failure)

    @classmethod
    def restore(cls, kept: bytes) -> "ServerProtocol":
        """Return the instance that goes on from a journal; its clients get what it waits for by :meth:`resend`.

        Raises ``google.protobuf.message.DecodeError`` for what is no journal.
        """
        state = pb.SecureJournal.FromString(kept)
        participants = [Participant(each.pool, each.index, each.attempt, each.instance) for each in state.entries]
        result = cls(state.job_uid, state.begin, participants)
        journal.restore_setup(state, result._setup)
        result.dropped = dict.fromkeys(result._ids(state.gone), "it was dropped before the restart")
        result.failure = state.failure
        if state.phase != Phase.FAILED:
            result._ask_for_consent()
            result._answers.consents = {each.entry: each.signature for each in state.consents}
            for entry, signature in result._answers.consents.items():
                result._note_answer(entry, consent=pb.SecureConsent(signature=signature))
        if state.phase in (Phase.UNMASK, Phase.DONE):
            result._ask_for_shares()
            for answer in state.unmasks:
                result._answers.add_unmask(answer.entry, answer.unmask)
                result._note_answer(answer.entry, unmask=answer.unmask)
        result.phase = Phase(state.phase)
        if result.phase is Phase.DONE:
            result.waiting_for = set()
        return result

    def _note_answer(self, entry: int, **step: Any) -> None:
        self._mail.note(self._id(entry), pb.SecureClientMessage(incarnation=self.incarnation, **step))
        self.waiting_for.discard(self._id(entry))

    # ---- messages of clients

    def _is_new(self, who: ClientId, step: str, message: pb.SecureClientMessage) -> bool:
        """Check that a message may come now; return False if it is a repetition. Raises ``Refusal``."""
        setup = self._setup
        neighbours = setup.neighbours.get(setup.numbers.get(who, -1), frozenset())
        messages.check_size(message, len(neighbours), len(setup.entries))
        if message.incarnation != self.incarnation:
            raise Refusal(Reason.INCARNATION, f"a message of instance {message.incarnation}, which has not begun")
        if self._mail.is_repeated(who, message):
            return False
        if step in _PHASES and _PHASES[step] < self.phase:
            return False  # answered before a restart, which forgot it
        if step == "complaint":
            expected = self.phase >= Phase.COLLECT and setup.numbers.get(who) in setup.senders
        else:
            expected = step == "refusal" or (step == _STEPS.get(self.phase) and who in self.waiting_for)
        if not expected:
            raise Refusal(Reason.ORDER, f"{step} came in the phase {self.phase.name}")
        self._mail.note(who, message)
        return True

    def _consequences(self, who: ClientId, step: str, message: pb.SecureClientMessage) -> list[Outgoing]:
        """Return what follows from an answer, beside the end of its phase."""
        if step == "refusal":
            return self._refused(who, message.refusal)
        if step == "complaint":
            for entry in message.complaint.entries:
                left = self._setup.holders(entry) & self._setup.senders - self._setup.unusable[entry]
                if len(left) < self._setup.threshold(entry):
                    text = f"shares of {self._names([entry])} can be opened by {len(left)} of their holders only"
                    return [*self._fault(self._id(entry), Reason.SHARES, text), *self._fail(text)]
        return []

    def _refused(self, who: ClientId, refusal: pb.SecureRefusal) -> list[Outgoing]:
        self.faults.append(Fault(who, REFUSED, one_line(f"{refusal.reason}: {refusal.message}")))
        self._note_drop(who, f"it refused: {refusal.message}")
        outs = []
        for entry in set(refusal.entries) & self._answers.blames.keys():
            blamed = self._id(entry)
            if 2 * len(self._answers.blames[entry]) > len(self._setup.entries) - 1 and blamed not in self.culprits:
                outs += self._fault(blamed, Reason.BLAMED, f"most clients object: {refusal.message}")
        return outs

    def _fault(self, who: ClientId, reason: str, text: str) -> list[Outgoing]:
        self.faults.append(Fault(who, reason, one_line(text)))
        return [] if who in self.dropped or self.phase in _ENDED else self._out(who, text)

    def _out(self, who: ClientId, text: str) -> list[Outgoing]:
        self._note_drop(who, text)
        return self._mail.send([who], end=pb.SecureEnd(message=one_line(text)))

    def _note_drop(self, who: ClientId, reason: str) -> None:
        self.dropped[who] = one_line(reason)
        self.waiting_for.discard(who)

    # ---- phases

    def _go_on(self) -> list[Outgoing]:
        """End phases for which nothing is lacking."""
        outgoing = []
        while self.phase in _STEPS and not (self.waiting_for and self._lacking):
            outgoing += self._conclude()
        return outgoing

    @property
    def _lacking(self) -> bool:
        """False if the present phase can end before all have answered: all secrets are known."""
        secrets = self._answers.secrets
        return self.phase is not Phase.UNMASK or secrets is None or bool(secrets.missing)

    def _conclude(self) -> list[Outgoing]:
        conclude = {
            Phase.ADVERTISE: self._conclude_advertise, Phase.REVEAL: self._conclude_reveal,
            Phase.SHARES: self._conclude_shares, Phase.CONSENT: self._conclude_consent,
            Phase.UNMASK: self._conclude_unmask,
        }  # fmt: skip
        return conclude[self.phase]()

    def _conclude_advertise(self) -> list[Outgoing]:
        entries = [entry for who, entry in self._answers.entries.items() if who not in self.dropped]
        if len(entries) < self._fewest:
            return self._fail(f"{len(entries)} of {len(self.participants)} clients have sent valid keys; "
                              f"at least {self._fewest} must")  # fmt: skip
        self._setup.fix_entries(entries)
        self.waiting_for = set(self._setup.numbers)
        roster = pb.SecureRoster(entries=self._setup.entries)
        if self._setup.complete:
            self._setup.fix_graph({})
            self.phase = Phase.SHARES
        else:
            self.phase = Phase.REVEAL
        return self._mail.send(self.waiting_for, roster=roster)

    def _conclude_reveal(self) -> list[Outgoing]:
        nonces = {
            number: nonce for number, nonce in self._answers.nonces.items() if self._id(number) not in self.dropped
        }
        if len(nonces) < self._fewest:
            return self._fail(f"{len(nonces)} clients have revealed their nonces; at least {self._fewest} must")
        self._setup.fix_graph(nonces)
        self.phase = Phase.SHARES
        self.waiting_for = set(self._ids(nonces))
        message = pb.SecureNonces(nonces=self._setup.nonces)
        return self._mail.send(self.waiting_for, nonces=message)

    def _conclude_shares(self) -> list[Outgoing]:
        setup = self._setup
        sent = {number for number in self._answers.sealed if self._id(number) not in self.dropped}
        setup.fix_senders(sent)
        if shortage := self.shortage(self._ids(setup.senders)):
            return self._fail(f"too few clients have sent shares of their secrets: {shortage}")
        self.phase = Phase.COLLECT
        text = "too few of the clients that hold this client's shares have sent theirs"
        outs = [out for number in sorted(sent - setup.senders) for out in self._out(self._id(number), text)]
        senders = sorted(setup.senders)
        for receiver in senders:
            sealed = [pb.SecureSealed(peer=sender, ciphertext=self._answers.sealed[sender][receiver])
                      for sender in sorted(setup.neighbours[receiver] & setup.senders)]  # fmt: skip
            outs += self._mail.send([self._id(receiver)], shares=pb.SecureShares(sealed=sealed, senders=senders))
        return outs

    def _ask_for_consent(self) -> list[Outgoing]:
        self.phase = Phase.CONSENT
        self.waiting_for = set(self.survivors - self.dropped.keys())
        message = pb.SecureSurvivors(entries=sorted(self._setup.survivors))
        return self._mail.send(self.waiting_for, survivors=message)

    def _conclude_consent(self) -> list[Outgoing]:
        agreed = frozenset(self._agreed)
        if shortage := self._setup.shortage(self._setup.survivors, self._present(agreed), self._fewest, self._parties):
            return self._fail(f"too few clients agree to open the sum: {shortage}")
        return self._ask_for_shares()

    @property
    def _agreed(self) -> list[int]:
        """Entries that have signed the survivors, as have enough of the clients that hold their shares."""
        setup, signed = self._setup, self._answers.consents.keys()
        return [entry for entry in sorted(signed) if len(setup.holders(entry) & signed) >= setup.threshold(entry)]

    def _ask_for_shares(self) -> list[Outgoing]:
        setup, consents = self._setup, self._answers.consents
        self.phase = Phase.UNMASK
        self._answers.secrets = Secrets(setup)
        asked = self._present(self._agreed)
        self.waiting_for = set(self._ids(asked))
        outs = []
        for entry in sorted(asked):
            signed = journal.signatures({each: consents[each] for each in setup.neighbours[entry] & consents.keys()})
            outs += self._mail.send([self._id(entry)], consents=pb.SecureConsents(signatures=signed))
        return outs

    def _conclude_unmask(self) -> list[Outgoing]:
        secrets = self._answers.secrets
        assert secrets is not None
        lost = secrets.conclude()
        for holder, entries in sorted(secrets.wrong.items()):
            self.faults.append(Fault(self._id(holder), Reason.SHARES, f"wrong shares for {self._names(entries)}"))
        if not lost:
            self.phase = Phase.DONE
            return self._end("")
        scarce = secrets.shortage()
        for entry in sorted(lost - scarce.keys()):
            self.faults.append(Fault(self._id(entry), Reason.SHARES, "the shares it gave away do not give its secret"))
        return self._fail(f"the secrets of {self._names(lost)} cannot be recovered from the shares of "
                          f"{len(self._answers.unmasks)} clients")  # fmt: skip

    def _fail(self, text: str) -> list[Outgoing]:
        self.phase = Phase.FAILED
        self.failure = one_line(text)
        return self._end(self.failure)

    def _end(self, text: str) -> list[Outgoing]:
        self.waiting_for = set()
        return self._mail.send(self._mail.clients - self.dropped.keys(), end=pb.SecureEnd(message=text))

    # ---- names and messages

    def _present(self, entries: Iterable[int]) -> frozenset[int]:
        return frozenset(entry for entry in entries if self._id(entry) not in self.dropped)

    def _id(self, entry: int) -> ClientId:
        return id_of(self._setup.entries[entry])

    def _ids(self, entries: Iterable[int]) -> frozenset[ClientId]:
        return frozenset(map(self._id, entries))

    def _names(self, entries: Iterable[int]) -> str:
        names = [name_of(self._setup.entries[entry]) for entry in sorted(entries)]
        others = f" and {len(names) - _SHOWN} others" if len(names) > _SHOWN else ""
        return ", ".join(names[:_SHOWN]) + others
