"""Aggregator that gives some of its clients other work than the rest: ``python malicious_aggregator.py LIE ARGUMENTS``.

With secure aggregation it cannot see one client's update. It can try to have the others contribute nothing.
"""

import sys
from collections.abc import Callable

from isthmus.aggregator.__main__ import main
from isthmus.aggregator.clients.membership import Client
from isthmus_contracts.pb import federation_pb2 as pb


def other_config(offer: pb.Offer) -> None:
    offer.config["rate"] = "0"


def other_parameters(offer: pb.Offer) -> None:
    offer.parameters["mu"] = "50"


def no_proximal_term(offer: pb.Offer) -> None:
    offer.algorithm = "FedAvg"


LIES: dict[str, Callable[[pb.Offer], None]] = {
    each.__name__: each for each in (other_config, other_parameters, no_proximal_term)
}


def lie(to: Callable[[pb.Offer], None]) -> None:
    """Change the offers of all clients but the first."""
    send = Client.send

    def sent(client: Client, message: pb.ServerMessage) -> None:
        if message.HasField("offer") and message.offer.kind == pb.Offer.TRAIN and client.id[1] != 0:
            changed = pb.ServerMessage()
            changed.CopyFrom(message)
            to(changed.offer)
            message = changed
        send(client, message)

    Client.send = sent  # type: ignore[method-assign]


if __name__ == "__main__":
    lie(LIES[sys.argv.pop(1)])
    main()
