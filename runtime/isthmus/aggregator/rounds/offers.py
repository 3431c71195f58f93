"""Offers of work to clients."""

import time

from isthmus_contracts.api.compression import NONE
from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.pb import federation_pb2 as pb

from ..clients.membership import Client, ClientId
from ..model import messages
from ..model.compression import Compression
from ..model.global_model import GlobalModel
from ..secure.rounds import SecureRounds
from ..state.training_state import ActiveRound
from ..telemetry.round_statistics import RoundStatistics


class Offers:
    """Sender of offers that start from the newest committed model."""

    def __init__(
        self, spec: FederatedJobSpec, compression: Compression, statistics: RoundStatistics,
        secure: SecureRounds | None = None,
    ) -> None:  # fmt: skip
        self._spec = spec
        self._compression = compression
        self._statistics = statistics
        self._secure = secure
        self._train_offer: pb.ServerMessage | None = None  # of the round in progress: the same for all clients
        self.offered: set[ClientId] = set()
        """Clients that were offered the newest model."""

    def begin_model(self) -> None:
        """Discard what was offered of the previous model."""
        self.offered.clear()

    def begin_round(self) -> None:
        """Discard the offer of the previous round."""
        self._train_offer = None

    def train(self, client: Client, current: ActiveRound) -> None:
        """Offer the round's work to a client."""
        client.note_offer(current.number, time.monotonic())
        if client.successors:
            return  # the offer goes to the successor, which takes over in a moment
        if self._train_offer is None:
            self._train_offer = messages.train(self._spec, current.number, current.base, self._compression)
            self._mark(self._train_offer.offer)
        self._send(client, self._train_offer, current.base)

    def evaluate(self, client: Client, model: GlobalModel) -> None:
        """Ask a client to evaluate the model."""
        message = messages.evaluate(model, self._compression)
        self._mark(message.offer)
        self._send(client, message, model)

    def evaluate_only(self, client: Client, model: GlobalModel) -> None:
        """Ask a client that does not train to evaluate the model, as it does with every model."""
        if client.ready and client.evaluates and not client.trains:
            self.evaluate(client, model)

    def _mark(self, offer: pb.Offer) -> None:
        """Mark an offer whose answer has to be masked."""
        if self._secure is not None:
            offer.secure, offer.secure_attempt = True, self._secure.attempt

    def _send(self, client: Client, message: pb.ServerMessage, model: GlobalModel) -> None:
        if client.connected:
            if message.offer.model:
                self._statistics.sent(client.id[0], NONE, model.size)
            self.offered.add(client.id)
        client.send(message)
