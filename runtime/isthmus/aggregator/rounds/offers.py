"""The work that clients are offered."""

import time

from isthmus_contracts.api.compression import NONE
from isthmus_contracts.api.federated_job import FederatedJobSpec
from isthmus_contracts.pb import federation_pb2 as pb

from ..clients.membership import Client, ClientId
from ..model import messages
from ..model.compression import Compression
from ..state.round_decision import RoundState
from ..state.training_state import TrainingState
from ..telemetry.round_statistics import RoundStatistics


class Offers:
    """Makes them of the newest committed model, which must be there, and sends them."""

    def __init__(
        self, spec: FederatedJobSpec, training: TrainingState, compression: Compression, statistics: RoundStatistics
    ) -> None:
        self._spec = spec
        self._training = training
        self._compression = compression
        self._statistics = statistics
        self._train_offer: pb.ServerMessage | None = None  # of the round in progress: the same for all
        self.offered: set[ClientId] = set()
        """The clients that were offered the newest model."""

    def renew(self) -> None:
        """Start over: there is a new model."""
        self.offered.clear()

    def begin(self) -> None:
        """A new round has begun."""
        self._train_offer = None

    def train(self, client: Client, state: RoundState) -> None:
        """Offers the round's work to a client."""
        client.offered(state.number, time.monotonic())
        if client.successors:
            return  # its successor, which comes in a moment, is asked instead
        if self._train_offer is None:
            assert self._training.model is not None
            self._train_offer = messages.train(self._spec, state.number, self._training.model, self._compression)
        self._send(client, self._train_offer)

    def evaluate(self, client: Client) -> None:
        """Asks a client to measure the model."""
        assert self._training.model is not None
        self._send(client, messages.evaluate(self._training.model, self._compression))

    def watch(self, client: Client) -> None:
        """A client that trains nothing measures every model."""
        if client.ready and client.evaluates and not client.trains:
            self.evaluate(client)

    def _send(self, client: Client, message: pb.ServerMessage) -> None:
        if client.connected and message.offer.model:
            assert self._training.model is not None
            self._statistics.sent(client.id[0], NONE, self._training.model.size)
        if client.connected:
            self.offered.add(client.id)
        client.send(message)
