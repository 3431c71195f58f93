"""The journal of an instance whose survivors are fixed: with it, a restarted aggregator goes on."""

from collections.abc import Mapping, Set

from isthmus_contracts.pb import secure_aggregation_pb2 as pb

from ..parameters import ClientId, Phase
from .answers import Answers
from .setup import Setup


def record(begin: pb.SecureBegin, answers: Answers, gone: Set[ClientId], phase: Phase, failure: str) -> bytes:
    """Return the state of an instance in one of the phases from CONSENT on."""
    setup = answers.setup
    return pb.SecureJournal(
        job_uid=setup.terms.job_uid, begin=begin, entries=setup.entries, nonces=setup.nonces,
        senders=sorted(setup.senders), survivors=sorted(setup.survivors), consents=signatures(answers.consents),
        unmasks=[pb.SecureUnmaskOf(entry=entry, unmask=unmask) for entry, unmask in sorted(answers.unmasks.items())],
        gone=sorted(setup.numbers[who] for who in gone & setup.numbers.keys()), phase=phase, failure=failure,
        complaints=[
            pb.SecureComplaintOf(entry=entry, complaint=pb.SecureComplaint(entries=sorted(holders)))
            for entry, holders in sorted(setup.unusable.items())
        ],
    ).SerializeToString()  # fmt: skip


def restore_setup(kept: pb.SecureJournal, setup: Setup) -> None:
    """Fill in the facts of a journal."""
    setup.fix_entries(kept.entries)
    setup.fix_graph({number: nonce for number, nonce in enumerate(kept.nonces) if nonce})
    setup.senders, setup.survivors = frozenset(kept.senders), frozenset(kept.survivors)
    setup.unusable = {each.entry: set(each.complaint.entries) for each in kept.complaints}


def signatures(consents: Mapping[int, bytes]) -> list[pb.SecureSignature]:
    return [pb.SecureSignature(entry=entry, signature=signature) for entry, signature in sorted(consents.items())]
