"""Rules of the client's own site for what may leave it, from the trust file beside the client's certificate.

The file comes from the site (its bridge, or the local runner) and never from the aggregator. Without one, everything
may leave.
"""

import logging
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from isthmus_contracts import identities
from isthmus_contracts.pb import federation_pb2 as pb
from isthmus_contracts.text import one_line
from isthmus_contracts.wire.parties import PartyError, Trust

from ..errors import FederationError
from .audit import AuditLog, Results, What

log = logging.getLogger("isthmus")

_WHAT: Mapping[int, What] = {
    pb.Offer.INITIALIZE: "initial-weights",
    pb.Offer.TRAIN: "update",
    pb.Offer.EVALUATE: "evaluation",
}


class SiteRules:
    """The site's trust file, and the audit log in which each decision is recorded.

    Raises :class:`FederationError` if the file is there and invalid: a damaged rule must not allow everything.
    """

    def __init__(self, directory: Path, audit: AuditLog) -> None:
        self._path = directory / identities.TRUST_FILE
        self._audit = audit
        self.trust: Trust | None = None
        """The rules, or ``None`` if the site has none."""
        self._secure = False  # an offer of this job was secure
        self._begun = False  # an offer of this job was for other work than the initial weights
        self._sent: dict[int, int] = {}  # bytes of each distinct update of the newest round
        self._round = 0
        try:
            self.trust = Trust.read(directory)
        except FileNotFoundError:
            return
        except OSError as error:
            raise FederationError(f"cannot read the site's rules: {self._path}: {error.strerror}") from None
        except PartyError as error:
            raise FederationError(f"the site's rules are invalid: {self._path}: {error}") from None

    @property
    def required(self) -> bool:
        """True if nothing that was trained may leave without secure aggregation."""
        return self._secure or (self.trust is not None and self.trust.required)

    def require_protection(self, offer: pb.Offer) -> None:
        """Refuse, before any work, an offer without secure aggregation where that is required.

        It is required if the trust file says so, and once an earlier offer of the job had it: an aggregator that
        stops asking for masks would get an update in clear. Initial weights are those of the script, which nothing
        has been trained on here: they may leave before any other work. Raises :class:`FederationError`.
        """
        initial = offer.kind == pb.Offer.INITIALIZE
        begun, self._begun = self._begun, self._begun or not initial
        if offer.secure:
            self._secure = True
            return
        if not self.required or (initial and not begun):
            return
        if initial:
            reason = "the aggregator asks for the model in clear, as initial weights, after it was trained"
        elif self._secure:
            reason = "the aggregator offers work without secure aggregation, in a job that began with it"
        else:
            reason = (
                f"this site requires secure aggregation ({self._path.name}: required), and the aggregator offers"
                " work without it: add spec.privacy.secureAggregation to the job's manifest if it is missing there"
            )
        self._refuse(Results(_WHAT[offer.kind], offer.round), reason)

    def require_names(self, names: Iterable[str], results: Results) -> None:
        """Raise :class:`FederationError` if a tensor of one of these names must not leave."""
        if self.trust is None:
            return
        patterns = self.trust.tensors
        kept = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
        if kept:
            self._refuse(
                results,
                f"this site does not let the tensor {one_line(kept[0], 100)} leave ({self._path.name}: tensors is"
                f" {', '.join(patterns[:5])}): leave it out, with isthmus.rounds(..., parameters=...)",
            )

    def admit(self, results: Results, names: Iterable[str], update: int) -> None:
        """Record results that are about to leave. Raises :class:`FederationError` if they must not.

        ``names``: of their tensors. ``update``: number of the update. Sending it again, also under other masks, tells
        nothing new, and does not count again towards the round's limit.
        """
        self.require_names(names, results)
        if results.round != self._round:
            self._round, self._sent = results.round, {}
        others = sum(size for number, size in self._sent.items() if number != update)
        limit = None if self.trust is None else self.trust.max_bytes_per_round
        if limit is not None and others + results.size > limit:
            beside = f", after {others} of others" if others else ""
            self._refuse(
                results,
                f"this site lets a client send {limit} bytes in a round ({self._path.name}: max_bytes_per_round), and"
                f" this update has {results.size}{beside}: send fewer tensors, with isthmus.rounds(...,"
                " parameters=...), or ask the site for more",
            )
        self._audit.sent(results)
        self._sent[update] = results.size

    def _refuse(self, results: Results, reason: str) -> None:
        self._audit.refused(results, reason)
        raise FederationError(reason)
