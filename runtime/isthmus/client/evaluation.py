"""What a script's evaluation function says of a global model."""

import math
from collections.abc import Callable, Mapping

from isthmus_contracts.pb import federation_pb2 as pb

Evaluate = Callable[[], Mapping[str, float]]


def measure(evaluate: Evaluate, offer: pb.Offer) -> pb.Evaluation:
    """Measures the model that an offer names, which the script's model holds."""
    metrics = {name: float(value) for name, value in evaluate().items()}
    weight = metrics.pop("num_examples", 1.0)
    return pb.Evaluation(
        model_round=offer.base_round,
        model_digest=offer.base_digest,
        num_examples=max(int(weight), 1),
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
    )
